// One conversation and its options → the plain request that crosses to native: pictures decoded
// and cut, prompt rendered and encoded, limits applied. Tiles are cut on native threads; the rest
// runs on the JS thread.
import { availableParallelism } from 'node:os';
import { BadWordSpeller } from './bad-words.js';
import type { PromptBuilder } from './chat.js';
import type { ImageSettings } from './checkpoint/checkpoint.js';
import { TurbomindError } from './errors.js';
import { type ImageLimits, type Picture, readPicture } from './image.js';
import { hashOf } from './image-pixels.js';
import { Limiter } from './limiter.js';
import { type ChatMessage, type ImagePart, imagesOf } from './messages.js';
import { fromNative } from './native.js';
import type {
  NativeAddon,
  NativeRequest,
  NativeSampling,
  NativeTileOptions,
  NativeTiles,
} from './native-types.js';
import type { ResolvedGenerationOptions, TilingOptions } from './options.js';
import { TileCache } from './tile-cache.js';
import type { Tokenizer } from './tokenizer.js';
import { ENCODING_SLICE_MS, Turns } from './turns.js';

/** What preparing needs of an open pipeline. */
export interface PrepareContext {
  readonly addon: Pick<NativeAddon, 'makeTiles' | 'hashBytes'>;
  readonly tokenizer: Tokenizer;
  readonly promptBuilder: PromptBuilder;
  readonly image: ImageSettings | undefined;
  readonly tiling: TilingOptions;
  readonly imageLimits: ImageLimits;
  /** Tokens of prompt and completion. */
  readonly sessionLen: number;
  readonly vocabSize: number;
}

export class RequestPreparer {
  readonly #context: PrepareContext;
  // A decoded picture may take hundreds of MB: a batch of a thousand must not decode at once.
  readonly #pictures = new Limiter(Math.max(2, availableParallelism()));
  // Prompts of a batch are encoded one behind the other, with pauses for events.
  readonly #encoding = new Limiter(1);
  readonly #tiles: TileCache;
  readonly #badWords: BadWordSpeller;
  readonly #turns = new Turns(ENCODING_SLICE_MS);

  constructor(context: PrepareContext) {
    this.#context = context;
    this.#tiles = new TileCache((bytes) => hashOf(context.addon, bytes));
    this.#badWords = new BadWordSpeller(context.tokenizer, context.vocabSize);
  }

  /** @throws TurbomindError for this prompt alone; `signal.reason` when the caller aborts. */
  async prepare(
    conversation: readonly ChatMessage[],
    options: ResolvedGenerationOptions,
  ): Promise<Omit<NativeRequest, 'id'>> {
    const tiles = await this.#cutPictures(conversation, options);
    return await this.#encoding.run(async () => {
      await this.#turns.giveWay();
      options.signal?.throwIfAborted();
      const badWords = await this.#badWords.spell(options.badWords, () => this.#turns.giveWay());
      return this.#build(conversation, tiles, options, badWords);
    });
  }

  #build(
    conversation: readonly ChatMessage[],
    tiles: readonly NativeTiles[],
    options: ResolvedGenerationOptions,
    badWords: readonly (readonly number[])[],
  ): Omit<NativeRequest, 'id'> {
    const { promptBuilder, sessionLen } = this.#context;
    const { ids, imageSpans } = promptBuilder.build(
      conversation,
      tiles.map(({ numTiles }) => numTiles),
    );
    const room = sessionLen - ids.length;
    if (room < 1) throw tooLong(ids.length, sessionLen, imageSpans.length);
    const maxNewTokens = Math.min(options.maxNewTokens ?? room, room);
    return {
      promptTokens: ids,
      images: imageSpans.map((span, index) => ({ tiles: at(tiles, index), ...span })),
      sampling: this.#sampling(options, badWords),
      maxNewTokens,
      minNewTokens: Math.min(options.minNewTokens, maxNewTokens),
      priority: options.priority,
      queueTimeoutMs: options.queueTimeoutMs,
      stopTokenIds: this.#stopTokenIds(options),
      guided: options.grammar !== undefined,
      editsLogits: options.logitsProcessors.length > 0,
      outputs: {
        logits: options.outputLogits,
        hiddenStates: options.outputLastHiddenState,
        pooling: 'none',
        promptNll: false,
      },
    };
  }

  async #cutPictures(
    conversation: readonly ChatMessage[],
    options: ResolvedGenerationOptions,
  ): Promise<NativeTiles[]> {
    const pictures = imagesOf(conversation);
    if (pictures.length === 0) return [];
    const { image } = this.#context;
    if (image === undefined) {
      throw new TurbomindError(
        'ERR_TM_INVALID_PROMPT',
        `the prompt holds ${pictures.length} image(s), but this model reads text only`,
      );
    }
    return await settleAll(
      pictures.map((picture) => {
        const tiling = this.#tileOptions(image, picture, pictures.length, options);
        return this.#pictures.run(() => this.#cut(picture, tiling, options.signal));
      }),
    );
  }

  async #cut(
    picture: ImagePart,
    tiling: NativeTileOptions,
    signal: AbortSignal | undefined,
  ): Promise<NativeTiles> {
    signal?.throwIfAborted();
    const read = await readPicture(picture.image, this.#context.imageLimits, signal);
    signal?.throwIfAborted();
    return await this.#tiles.get(read, tiling, () => this.#cutDecoded(read, tiling, signal));
  }

  async #cutDecoded(
    picture: Picture,
    tiling: NativeTileOptions,
    signal: AbortSignal | undefined,
  ): Promise<NativeTiles> {
    const { data, width, height, channels } = await picture.decode();
    signal?.throwIfAborted();
    try {
      return await this.#context.addon.makeTiles(data, width, height, channels, tiling);
    } catch (error) {
      throw fromNative(error);
    }
  }

  // The nearest setting wins: picture, request, pipeline, model. A budget only lowers it, shared
  // out as InternVL does over the pictures of a prompt.
  #tileOptions(
    image: ImageSettings,
    picture: ImagePart,
    numPictures: number,
    options: ResolvedGenerationOptions,
  ): NativeTileOptions {
    const { tiling } = this.#context;
    const limit =
      picture.maxDynamicPatch ??
      options.tiling.maxTiles ??
      tiling.maxTiles ??
      image.maxDynamicPatch;
    const share =
      options.tileBudget === undefined
        ? limit
        : Math.max(1, Math.floor(options.tileBudget / numPictures));
    const maxTiles = Math.min(limit, share);
    const minTiles = options.tiling.minTiles ?? tiling.minTiles ?? image.minDynamicPatch;
    return {
      tileSize: image.tileSize,
      minTiles: Math.min(minTiles, maxTiles),
      maxTiles,
      useThumbnail: options.tiling.useThumbnail ?? tiling.useThumbnail ?? image.useThumbnail,
    };
  }

  #sampling(
    options: ResolvedGenerationOptions,
    badWords: readonly (readonly number[])[],
  ): NativeSampling {
    const { doSample, temperature, topK, topP, minP, seed, logitBias } = options;
    const { repetitionPenalty, frequencyPenalty, presencePenalty } = options;
    const { vocabSize } = this.#context;
    this.#checkIds(
      'logitBias',
      logitBias.map(([id]) => id),
    );
    return {
      doSample,
      temperature,
      topK: topK >= vocabSize ? 0 : topK,
      topP,
      minP,
      repetitionPenalty,
      frequencyPenalty,
      presencePenalty,
      logitBias,
      seed,
      numLogprobs: Math.min(options.numLogprobs, vocabSize),
      badWords,
    };
  }

  #stopTokenIds(options: ResolvedGenerationOptions): number[] {
    const { tokenizer } = this.#context;
    this.#checkIds('stopTokenIds', options.stopTokenIds);
    return [...new Set([...(options.ignoreEos ? [] : tokenizer.eosIds), ...options.stopTokenIds])];
  }

  #checkIds(option: string, ids: readonly number[]): void {
    const { vocabSize } = this.#context;
    const outside = ids.find((id) => id >= vocabSize);
    if (outside === undefined) return;
    throw new TurbomindError(
      'ERR_TM_INVALID_OPTION',
      `${option}: ${outside} is not a token; expected 0 to ${vocabSize - 1}`,
    );
  }
}

// Like Promise.all, but ends only when no picture is being worked on any more.
async function settleAll<T>(promises: readonly Promise<T>[]): Promise<T[]> {
  await Promise.allSettled(promises);
  return await Promise.all(promises);
}

function at<T>(list: readonly T[], index: number): T {
  const item = list[index];
  if (item === undefined) {
    throw new TurbomindError('ERR_TM_INTERNAL', `the prompt has more placeholders than images`);
  }
  return item;
}

function tooLong(numTokens: number, sessionLen: number, numImages: number): TurbomindError {
  const remedy =
    numImages > 0
      ? 'shorten it, raise sessionLen, or lower maxDynamicPatch or maxTiles'
      : 'shorten it, or raise sessionLen';
  return new TurbomindError(
    'ERR_TM_PROMPT_TOO_LONG',
    `the prompt has ${numTokens} tokens, but a session holds ${sessionLen}, the completion included; ${remedy}`,
  );
}
