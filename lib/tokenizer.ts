// Text ↔ token ids behind one interface. Wraps the tokenizer library, which is built on first use:
// a 151k vocabulary takes it half a second, time that a native load on its own threads can hide.
// Text out of ids is lib/detokenizer.ts's, on the byte tables kept here. Runs on the JS thread.

import { join } from 'node:path';
import { Tokenizer as HfTokenizer } from '@huggingface/tokenizers';
import { findChatFormat } from './chat-formats.js';
import type { Checkpoint } from './checkpoint/checkpoint.js';
import { isJsonObject, type JsonObject, jsonGet, readJsonFile } from './checkpoint/json.js';
import { TurbomindError } from './errors.js';

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
   * @throws TurbomindError ERR_TM_INVALID_PROMPT when the text is longer than `maxInputChars`.
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
  /** Rows of the embedding table; a greater id would read beyond it. */
  readonly modelVocabSize: number;
  /** Ids that end an answer, beside the tokenizer's own eos token. */
  readonly eosIds: readonly number[];
  /** More tokens that end an answer. */
  readonly stopTokens?: readonly string[];
  /** UTF-16 units; longer texts are refused, because encoding blocks the JS thread. */
  readonly maxInputChars?: number;
}

/** 4 Mi characters: far beyond any context, and still seconds of work at most for normal text. */
const DEFAULT_MAX_INPUT_CHARS = 4 * 1024 * 1024;

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
    ...options,
  });
  for (const token of image ? [image.startToken, image.endToken, image.contextToken] : []) {
    if (tokenizer.idOf(token) === undefined) {
      throw invalid(`has no image token ${token}, which this vision-language model needs`);
    }
  }
  if (image !== undefined && tokenizer.idOf(image.contextToken) !== spec.imageTokenId) {
    throw invalid(
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

/** An entry of `added_tokens`. */
interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly isSpecial: boolean;
  readonly stripsLeft: boolean;
  readonly stripsRight: boolean;
}

/** How the vocabulary spells bytes. */
type DecoderKind = 'byte-level' | 'sentencepiece';

class LibraryTokenizer implements Tokenizer {
  readonly #source: TokenizerSource;
  readonly #added: ReadonlyMap<string, AddedToken>;
  readonly #addedById: ReadonlyMap<number, AddedToken>;
  readonly #specialIds: ReadonlySet<number>;
  readonly #decoder: DecoderKind;
  readonly #maxInputChars: number;
  readonly #texts = new Map<number, string | undefined>();
  #library: HfTokenizer | undefined;
  readonly eosIds: readonly number[];
  readonly stripsLeadingSpace: boolean;
  readonly specialTokens: readonly string[];

  constructor(source: TokenizerSource) {
    this.#source = source;
    const added = readAddedTokens(source.json, source.modelVocabSize);
    this.#added = new Map(added.map((token) => [token.content, token]));
    this.#addedById = new Map(added.map((token) => [token.id, token]));
    this.#specialIds = new Set(added.filter((token) => token.isSpecial).map((token) => token.id));
    this.specialTokens = added.filter((token) => token.isSpecial).map((token) => token.content);
    const decoder = readDecoder(source.json);
    this.#decoder = decoder.kind;
    this.stripsLeadingSpace = decoder.stripsLeadingSpace;
    this.#maxInputChars = source.maxInputChars ?? DEFAULT_MAX_INPUT_CHARS;
    this.eosIds = this.#findEosIds();
  }

  #findEosIds(): number[] {
    const { config, eosIds, stopTokens = [] } = this.#source;
    const eosToken = tokenText(jsonGet(config, 'eos_token'));
    const tokens = eosToken === undefined ? stopTokens : [eosToken, ...stopTokens];
    const ids = tokens.flatMap((token) => this.idOf(token) ?? []);
    return [...new Set([...eosIds, ...ids])];
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
    if (added !== undefined) return UTF8.encode(added.content);
    const token = this.#built().id_to_token(id);
    if (token === undefined) return new Uint8Array(0);
    return this.#decoder === 'byte-level' ? byteLevelBytes(token) : sentencepieceBytes(token);
  }

  textOf(id: number): string | undefined {
    const known = this.#texts.get(id);
    if (known !== undefined || this.#texts.has(id)) return known;
    const text = decodeWhole(this.bytesOf(id));
    this.#texts.set(id, text);
    return text;
  }

  encode(text: string, options: EncodeOptions = {}): number[] {
    if (text.length > this.#maxInputChars) {
      throw new TurbomindError(
        'ERR_TM_INVALID_PROMPT',
        `the prompt has ${text.length} characters; the limit is ${this.#maxInputChars}`,
      );
    }
    const { addSpecialTokens = false, literalMark } = options;
    if (literalMark !== undefined && text.includes(literalMark)) {
      return this.#encodeMarked(text, literalMark, addSpecialTokens);
    }
    return this.#built().encode(text, { add_special_tokens: addSpecialTokens }).ids;
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

function buildLibrary({ json, config, modelVocabSize }: TokenizerSource): HfTokenizer {
  let library: HfTokenizer;
  try {
    // Reading never cleans spaces up: it would make streamed text differ from whole text.
    library = new HfTokenizer(json, { ...config, clean_up_tokenization_spaces: false });
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw invalid(`cannot be used: ${reason}`, cause);
  }
  const size = library.model?.vocab.length ?? 0;
  if (size > modelVocabSize) {
    throw invalid(
      `has ids up to ${size - 1}, but the model's vocabulary ends at ${modelVocabSize}`,
    );
  }
  return library;
}

function readAddedTokens(json: JsonObject, modelVocabSize: number): AddedToken[] {
  if (!isJsonObject(jsonGet(json, 'model'))) throw invalid('has no "model" object');
  const list = jsonGet(json, 'added_tokens') ?? [];
  if (!Array.isArray(list)) throw invalid('has added_tokens that are not a list');
  return list.map((entry: unknown) => {
    const { id, content } = isJsonObject(entry) ? entry : {};
    if (typeof id !== 'number' || !Number.isInteger(id) || typeof content !== 'string') {
      throw invalid(`has a malformed added token ${JSON.stringify(entry)}`);
    }
    if (content === '' || id < 0 || id >= modelVocabSize) {
      throw invalid(
        `has the added token ${JSON.stringify(content)} with id ${id}; the model's vocabulary ` +
          `has ${modelVocabSize}`,
      );
    }
    const flags = isJsonObject(entry) ? entry : {};
    return {
      id,
      content,
      isSpecial: flags.special === true,
      stripsLeft: flags.lstrip === true,
      stripsRight: flags.rstrip === true,
    };
  });
}

function readDecoder(json: JsonObject): { kind: DecoderKind; stripsLeadingSpace: boolean } {
  const decoder = jsonGet(json, 'decoder');
  const steps = flattenDecoder(decoder);
  const types = steps.map((step) => step.type);
  if (types.length === 1 && types[0] === 'ByteLevel') {
    return { kind: 'byte-level', stripsLeadingSpace: false };
  }
  const sentencepiece = ['Replace', 'ByteFallback', 'Fuse', 'Strip', 'Metaspace'];
  if (types.length > 0 && types.every((type) => sentencepiece.includes(String(type)))) {
    const strips = steps.some((step) => {
      return step.type === 'Metaspace' || (step.type === 'Strip' && Number(step.start) > 0);
    });
    return { kind: 'sentencepiece', stripsLeadingSpace: strips };
  }
  throw invalid(
    `has the decoder ${JSON.stringify(types)}; supported are ByteLevel, and the sentencepiece ` +
      'steps Replace, ByteFallback, Fuse, Strip and Metaspace',
  );
}

function flattenDecoder(decoder: unknown): JsonObject[] {
  if (!isJsonObject(decoder)) return [];
  if (decoder.type !== 'Sequence') return [decoder];
  return Array.isArray(decoder.decoders) ? decoder.decoders.flatMap(flattenDecoder) : [];
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

const UTF8 = new TextEncoder();
const STRICT_UTF8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

function decodeWhole(bytes: Uint8Array): string | undefined {
  try {
    return STRICT_UTF8.decode(bytes);
  } catch {
    return undefined; // part of a character: normal for byte-level tokens
  }
}

/**
 * GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the other 68 bytes in
 * order for the characters from U+0100 on.
 */
const BYTE_OF_CHAR: ReadonlyMap<string, number> = (() => {
  const isPrintable = (byte: number): boolean =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  const table = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte += 1) {
    table.set(String.fromCharCode(isPrintable(byte) ? byte : next), byte);
    if (!isPrintable(byte)) next += 1;
  }
  return table;
})();

function byteLevelBytes(token: string): Uint8Array {
  const bytes: number[] = [];
  for (const char of token) {
    const byte = BYTE_OF_CHAR.get(char);
    // A token with a character outside the alphabet is text, not spelled bytes.
    if (byte === undefined) return UTF8.encode(token);
    bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

function sentencepieceBytes(token: string): Uint8Array {
  const spelled = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1];
  if (spelled !== undefined) return Uint8Array.of(Number.parseInt(spelled, 16));
  return UTF8.encode(token.replaceAll('▁', ' '));
}

/** A token in tokenizer_config.json is a string or { content }. */
export function tokenText(value: unknown): string | undefined {
  const text = isJsonObject(value) ? value.content : value;
  return typeof text === 'string' ? text : undefined;
}

function invalid(problem: string, cause?: unknown): TurbomindError {
  return new TurbomindError(
    'ERR_TM_INVALID_TOKENIZER',
    `tokenizer.json ${problem}`,
    cause === undefined ? undefined : { cause },
  );
}
