// Text ↔ token ids behind one interface. Wraps the tokenizer library, which is built on first use:
// a 151k vocabulary takes it half a second, time that a native load on its own threads can hide.
// Text out of ids is lib/detokenizer.ts's, on the byte tables kept here. Runs on the JS thread.

import { join } from 'node:path';
import { Tokenizer as HfTokenizer } from '@huggingface/tokenizers';
import { findChatFormat } from './chat-formats.js';
import type { Checkpoint } from './checkpoint/checkpoint.js';
import { isJsonObject, type JsonObject, jsonGet, readJsonFile } from './checkpoint/json.js';
import { TurbomindError } from './errors.js';
import { type ByteSpelling, bytesOfText, bytesOfToken, textOfBytes } from './token-bytes.js';
import {
  type AddedToken,
  invalidTokenizer,
  readAddedTokens,
  readDecoder,
  tokenText,
} from './tokenizer-file.js';

export interface EncodeOptions {
  /** Add what the tokenizer's post-processor adds (a BOS token, mostly). Default false. */
  readonly addSpecialTokens?: boolean;
  /**
   * A character that is taken out of the text before encoding, and that keeps an added token it
   * stands in from being recognised: with the mark `|`, `<|IMG_CONTEXT>` encodes as the plain
   * characters `<IMG_CONTEXT>`. Default: none.
   */
  readonly literalMark?: string;
}

export interface Tokenizer {
  /**
   * Text to ids. Added tokens written in the text become their ids.
   *
   * @throws TurbomindError ERR_TM_INVALID_PROMPT when the text is longer than `maxInputChars`,
   * ERR_TM_INVALID_TOKENIZER when it needs a token that the model has no embedding for.
   */
  encode(text: string, options?: EncodeOptions): number[];
  /** One more than the greatest id that has a token. */
  readonly vocabSize: number;
  idOf(token: string): number | undefined;
  /** UTF-8 bytes of a token, maybe part of a character; empty for an id without a token. */
  bytesOf(id: number): Uint8Array;
  /** Text of a token whose bytes are whole characters; undefined for others. */
  textOf(id: number): string | undefined;
  isSpecial(id: number): boolean;
  /** Texts of the special tokens: what user text must not be able to write. */
  readonly specialTokens: readonly string[];
  /** Ids that end an answer: generation_config, the tokenizer's eos token, the chat format's. */
  readonly eosIds: readonly number[];
  /** True when the first space of a text stands for its beginning only (sentencepiece). */
  readonly stripsLeadingSpace: boolean;
  /** Builds what `encode` needs now (0.1-0.6 s for a large vocabulary) instead of on first use. */
  prepare(): void;
}

export interface TokenizerSource {
  /** tokenizer.json, parsed. */
  readonly json: JsonObject;
  /** tokenizer_config.json, parsed; {} when there is none. */
  readonly config: JsonObject;
  /** Rows of the embedding table; ids from there on are refused. */
  readonly modelVocabSize: number;
  /** Ids that end an answer, beside the tokenizer's own eos token. */
  readonly eosIds: readonly number[];
  /** More tokens that end an answer. */
  readonly stopTokens?: readonly string[];
  /** UTF-16 units; longer texts are refused, because encoding blocks the JS thread. */
  readonly maxInputChars?: number;
}

/** Characters; encoding takes 2-3 µs each for normal text, ten times that for one endless word. */
const DEFAULT_MAX_INPUT_CHARS = 4 * 1024 * 1024;

/** Normal text has 1 to 5 characters a token: beyond this no prompt can fit the model. */
const MAX_CHARS_PER_POSITION = 32;

/**
 * Reads and parses tokenizer.json. Start the native load first: the two overlap.
 *
 * @example
 * const tokenizer = await loadTokenizer(checkpoint);
 * tokenizer.encode('Hello'); // [39, 68, 75, 75, 78] for tiny-internvl
 *
 * @throws TurbomindError ERR_TM_INVALID_TOKENIZER.
 */
export async function loadTokenizer(
  checkpoint: Checkpoint,
  options: { readonly maxInputChars?: number } = {},
): Promise<Tokenizer> {
  const path = join(checkpoint.folder, 'tokenizer.json');
  const json = await readJsonFile(path, 'ERR_TM_INVALID_TOKENIZER');
  const { chatTemplate, image, spec } = checkpoint;
  const format = chatTemplate?.type === 'named' ? findChatFormat(chatTemplate.name) : undefined;
  const tokenizer = createTokenizer({
    json,
    config: checkpoint.tokenizerConfig,
    modelVocabSize: spec.decoder.vocabSize,
    eosIds: checkpoint.generation.eosTokenIds,
    stopTokens: format?.stopTokens ?? [],
    maxInputChars:
      options.maxInputChars ??
      Math.min(DEFAULT_MAX_INPUT_CHARS, MAX_CHARS_PER_POSITION * checkpoint.maxPositionEmbeddings),
  });
  for (const token of image ? [image.startToken, image.endToken, image.contextToken] : []) {
    if (tokenizer.idOf(token) === undefined) {
      throw invalidTokenizer(`has no image token ${token}, which this vision-language model needs`);
    }
  }
  if (image !== undefined && tokenizer.idOf(image.contextToken) !== spec.imageTokenId) {
    throw invalidTokenizer(
      `maps ${image.contextToken} to ${tokenizer.idOf(image.contextToken)}, the other config ` +
        `files to ${spec.imageTokenId}`,
    );
  }
  return tokenizer;
}

/**
 * Makes a tokenizer of parsed files.
 *
 * @throws TurbomindError ERR_TM_INVALID_TOKENIZER when they are not a tokenizer we can run.
 */
export function createTokenizer(source: TokenizerSource): Tokenizer {
  return new LibraryTokenizer(source);
}

class LibraryTokenizer implements Tokenizer {
  readonly #source: TokenizerSource;
  readonly #added: ReadonlyMap<string, AddedToken>;
  readonly #addedById: ReadonlyMap<number, AddedToken>;
  readonly #specialIds: ReadonlySet<number>;
  readonly #spelling: ByteSpelling;
  readonly #maxInputChars: number;
  readonly #texts = new Map<number, string | undefined>();
  #library: HfTokenizer | undefined;
  readonly eosIds: readonly number[];
  readonly stripsLeadingSpace: boolean;
  readonly specialTokens: readonly string[];

  constructor(source: TokenizerSource) {
    this.#source = source;
    const added = readAddedTokens(source.json);
    this.#added = new Map(added.map((token) => [token.content, token]));
    this.#addedById = new Map(added.map((token) => [token.id, token]));
    this.#specialIds = new Set(added.filter((token) => token.isSpecial).map((token) => token.id));
    this.specialTokens = added.filter((token) => token.isSpecial).map((token) => token.content);
    const decoder = readDecoder(source.json);
    this.#spelling = decoder.kind;
    this.stripsLeadingSpace = decoder.stripsLeadingSpace;
    this.#maxInputChars = source.maxInputChars ?? DEFAULT_MAX_INPUT_CHARS;
    this.eosIds = this.#findEosIds();
  }

  #findEosIds(): number[] {
    const { config, eosIds, stopTokens = [], modelVocabSize } = this.#source;
    const eosToken = tokenText(jsonGet(config, 'eos_token'));
    const tokens = eosToken === undefined ? stopTokens : [eosToken, ...stopTokens];
    const ids = tokens.flatMap((token) => this.idOf(token) ?? []);
    return [...new Set([...eosIds, ...ids])].filter((id) => id < modelVocabSize);
  }

  prepare(): void {
    this.#built();
  }

  #built(): HfTokenizer {
    this.#library ??= buildLibrary(this.#source);
    return this.#library;
  }

  get vocabSize(): number {
    return this.#built().model?.vocab.length ?? 0;
  }

  idOf(token: string): number | undefined {
    const added = this.#added.get(token);
    if (added !== undefined) return added.id;
    if (this.#library !== undefined) return this.#library.token_to_id(token);
    const model = jsonGet(this.#source.json, 'model');
    const vocab = isJsonObject(model) ? jsonGet(model, 'vocab') : undefined;
    const id = isJsonObject(vocab) ? jsonGet(vocab, token) : this.#built().token_to_id(token);
    return typeof id === 'number' ? id : undefined;
  }

  isSpecial(id: number): boolean {
    return this.#specialIds.has(id);
  }

  bytesOf(id: number): Uint8Array {
    const added = this.#addedById.get(id);
    if (added !== undefined) return bytesOfText(added.content);
    const token = this.#built().id_to_token(id);
    return token === undefined ? new Uint8Array(0) : bytesOfToken(token, this.#spelling);
  }

  textOf(id: number): string | undefined {
    const known = this.#texts.get(id);
    if (known !== undefined || this.#texts.has(id)) return known;
    const text = textOfBytes(this.bytesOf(id));
    this.#texts.set(id, text);
    return text;
  }

  encode(text: string, options: EncodeOptions = {}): number[] {
    if (text.length > this.#maxInputChars) {
      throw new TurbomindError(
        'ERR_TM_INVALID_PROMPT',
        `the prompt has ${text.length} characters; the limit is ${this.#maxInputChars}; shorten it`,
      );
    }
    const { addSpecialTokens = false, literalMark } = options;
    const isMarked = literalMark !== undefined && text.includes(literalMark);
    return this.#checked(
      isMarked
        ? this.#encodeMarked(text, literalMark, addSpecialTokens)
        : this.#built().encode(text, { add_special_tokens: addSpecialTokens }).ids,
    );
  }

  /** Some tokenizers have more ids than the model has embeddings; such a one cannot be run. */
  #checked(ids: number[]): number[] {
    const { modelVocabSize } = this.#source;
    const beyond = ids.find((id) => !(id < modelVocabSize));
    if (beyond === undefined) return ids;
    const token = JSON.stringify(this.#built().id_to_token(beyond) ?? null);
    throw invalidTokenizer(
      `gives the token ${token} the id ${beyond}, but the model's vocabulary ends at ` +
        `${modelVocabSize}; leave it out of the prompt`,
    );
  }

  /** The library's own steps, section by section, with marked added tokens left as plain text. */
  #encodeMarked(text: string, mark: string, addSpecialTokens: boolean): number[] {
    const library = this.#built();
    const sections = stripAround(splitAt(text, [...this.#added.keys()]), this.#added);
    const tokens = sections.flatMap((section, index) => {
      if (this.#added.has(section)) return [section];
      const plain = section.replaceAll(mark, '');
      const normalized = library.normalizer?.normalize(plain) ?? plain;
      if (normalized === '') return [];
      const words = library.pre_tokenizer?.pre_tokenize(normalized, { section_index: index });
      return library.model?._call(words ?? [normalized]) ?? [];
    });
    const framed: string[] | undefined = library.post_processor?.post_process(
      tokens,
      null,
      addSpecialTokens,
    ).tokens;
    return (framed ?? tokens).flatMap((token) => {
      return library.token_to_id(token) ?? library.model?.unk_token_id ?? [];
    });
  }
}

function buildLibrary({ json, config }: TokenizerSource): HfTokenizer {
  try {
    // Reading never cleans spaces up: it would make streamed text differ from whole text.
    return new HfTokenizer(json, { ...config, clean_up_tokenization_spaces: false });
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw invalidTokenizer(`cannot be used: ${reason}`, cause);
  }
}

/** Cuts a text at every occurrence of a token, longest first, tokens kept. */
function splitAt(text: string, tokens: readonly string[]): string[] {
  if (tokens.length === 0) return [text];
  const pattern = tokensPattern(tokens);
  return text.split(new RegExp(`(${pattern})`, 'u')).filter((section) => section !== '');
}

/** A regular expression for any of some texts, longest first. */
export function tokensPattern(tokens: readonly string[]): string {
  return [...tokens]
    .sort((a, b) => b.length - a.length)
    .map((token) => token.replace(/[.*+?^${}()|[\]\\/]/g, '\\$&'))
    .join('|');
}

/** Takes spaces away beside the tokens that ask for it. */
function stripAround(
  sections: readonly string[],
  added: ReadonlyMap<string, AddedToken>,
): string[] {
  return sections.map((section, index) => {
    if (added.has(section)) return section;
    const right = added.get(sections[index + 1] ?? '')?.stripsLeft ? section.trimEnd() : section;
    return added.get(sections[index - 1] ?? '')?.stripsRight ? right.trimStart() : right;
  });
}
