// tokenizer.json beyond what the tokenizer library makes of it: added tokens and how ids become bytes.
// Pure functions; lib/tokenizer.ts uses them.
import { isJsonObject, type JsonObject, jsonGet } from './checkpoint/json.js';
import { TurbomindError } from './errors.js';
import type { ByteSpelling } from './token-bytes.js';

/** An entry of `added_tokens`. */
export interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly isSpecial: boolean;
  readonly stripsLeft: boolean;
  readonly stripsRight: boolean;
}

export function readAddedTokens(json: JsonObject): AddedToken[] {
  if (!isJsonObject(jsonGet(json, 'model'))) throw invalidTokenizer('has no "model" object');
  const list = jsonGet(json, 'added_tokens') ?? [];
  if (!Array.isArray(list)) throw invalidTokenizer('has added_tokens that are not a list');
  return list.map((entry: unknown) => {
    const { id, content } = isJsonObject(entry) ? entry : {};
    const isToken = typeof content === 'string' && content !== '';
    if (!isToken || typeof id !== 'number' || !Number.isInteger(id) || id < 0) {
      throw invalidTokenizer(`has a malformed added token ${JSON.stringify(entry)}`);
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

export function readDecoder(json: JsonObject): { kind: ByteSpelling; stripsLeadingSpace: boolean } {
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
  throw invalidTokenizer(
    `has the decoder ${JSON.stringify(types)}; supported are ByteLevel, and the sentencepiece ` +
      'steps Replace, ByteFallback, Fuse, Strip and Metaspace',
  );
}

function flattenDecoder(decoder: unknown): JsonObject[] {
  if (!isJsonObject(decoder)) return [];
  if (decoder.type !== 'Sequence') return [decoder];
  return Array.isArray(decoder.decoders) ? decoder.decoders.flatMap(flattenDecoder) : [];
}

/** A token in tokenizer_config.json is a string or { content }. */
export function tokenText(value: unknown): string | undefined {
  const text = isJsonObject(value) ? value.content : value;
  return typeof text === 'string' ? text : undefined;
}

/** @returns ERR_TM_INVALID_TOKENIZER */
export function invalidTokenizer(problem: string, cause?: unknown): TurbomindError {
  return new TurbomindError(
    'ERR_TM_INVALID_TOKENIZER',
    `tokenizer.json ${problem}`,
    cause === undefined ? undefined : { cause },
  );
}
