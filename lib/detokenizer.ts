// Token ids to text, one by one: never half a character, and never text behind a stop string.
// Runs on the JS thread; one object per request; work is linear in the text.

import * as check from './check.js';
import { TurbomindError } from './errors.js';
import { type MatcherPiece, StopMatcher } from './stop-matcher.js';
import type { Tokenizer } from './tokenizer.js';

export interface DetokenizerOptions {
  /** Leave out special tokens. Default true. */
  readonly skipSpecialTokens?: boolean | undefined;
  /** Keep the space that stands for the beginning of a text: its bytes count. Default false. */
  readonly keepLeadingSpace?: boolean;
}

/**
 * Turns ids into text. Bytes of an unfinished character are held back; bytes that cannot become
 * one turn into U+FFFD. The pieces join to what decoding all ids at once gives.
 *
 * @example
 * const detokenizer = new Detokenizer(tokenizer);
 * for (const id of ids) process.stdout.write(detokenizer.push(id));
 * process.stdout.write(detokenizer.flush());
 */
export class Detokenizer {
  readonly #tokenizer: Tokenizer;
  readonly #skipSpecialTokens: boolean;
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  /** At most three bytes: the beginning of a character. */
  #pending: Uint8Array = NO_BYTES;
  #stripNext: boolean;

  constructor(tokenizer: Tokenizer, options: DetokenizerOptions = {}) {
    this.#tokenizer = tokenizer;
    this.#skipSpecialTokens = options.skipSpecialTokens ?? true;
    this.#stripNext = tokenizer.stripsLeadingSpace && options.keepLeadingSpace !== true;
  }

  /** The text that this token completes; '' when it only begins a character. */
  push(id: number): string {
    if (this.#skipSpecialTokens && this.#tokenizer.isSpecial(id)) return '';
    const whole = this.#pending.length === 0 ? this.#tokenizer.textOf(id) : undefined;
    return this.#strip(whole ?? this.#decode(this.#tokenizer.bytesOf(id)));
  }

  /** What is left at the end: U+FFFD for an unfinished character, else ''. */
  flush(): string {
    const rest = this.#decoder.decode(this.#pending);
    this.#pending = NO_BYTES;
    return this.#strip(rest);
  }

  #decode(bytes: Uint8Array): string {
    const all = this.#pending.length === 0 ? bytes : Buffer.concat([this.#pending, bytes]);
    const tail = unfinishedBytes(all);
    this.#pending = all.slice(all.length - tail);
    return this.#decoder.decode(all.subarray(0, all.length - tail));
  }

  #strip(text: string): string {
    if (!this.#stripNext || text === '') return text;
    this.#stripNext = false;
    return text.startsWith(' ') ? text.slice(1) : text;
  }
}

const NO_BYTES = new Uint8Array(0);

/** Number of bytes at the end that begin a character which more bytes could finish (0 to 3). */
function unfinishedBytes(bytes: Uint8Array): number {
  for (let back = 1; back <= Math.min(3, bytes.length); back += 1) {
    const lead = bytes[bytes.length - back] ?? 0;
    if ((lead & 0xc0) === 0x80) continue; // a continuation byte: its lead stands before it
    if (back >= characterBytes(lead)) return 0;
    return back === 1 || canFollow(lead, bytes[bytes.length - back + 1] ?? 0) ? back : 0;
  }
  return 0;
}

/** Length of the character that a lead byte announces; 0 for a byte that leads none. */
function characterBytes(lead: number): number {
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  if (lead >= 0xf0 && lead <= 0xf4) return 4;
  return 0;
}

/** UTF-8 forbids overlong forms, surrogates and code points above U+10FFFF by the second byte. */
function canFollow(lead: number, second: number): boolean {
  switch (lead) {
    case 0xe0:
      return second >= 0xa0;
    case 0xed:
      return second <= 0x9f;
    case 0xf0:
      return second >= 0x90;
    case 0xf4:
      return second <= 0x8f;
    default:
      return true;
  }
}

export interface TextStreamOptions extends DetokenizerOptions {
  /** Texts that end the answer; they are not part of it. Default none. */
  readonly stopStrings?: readonly string[];
}

/**
 * Ids in, text out, ending before the first stop string.
 *
 * @example
 * const stream = new TextStream(tokenizer, { stopStrings: ['\n\n'] });
 * for (const id of ids) {
 *   const { text, stop } = stream.push(id);
 *   show(text);
 *   if (stop !== undefined) break;
 * }
 * show(stream.flush().text);
 */
export class TextStream {
  readonly #detokenizer: Detokenizer;
  readonly #matcher: StopMatcher;

  constructor(tokenizer: Tokenizer, options: TextStreamOptions = {}) {
    this.#detokenizer = new Detokenizer(tokenizer, options);
    this.#matcher = new StopMatcher(options.stopStrings ?? []);
  }

  /** Text that can be shown now, '' while characters are held back; after a match always ''. */
  push(id: number): MatcherPiece {
    return this.#matcher.push(this.#detokenizer.push(id));
  }

  /** What was held back, at the end of the answer; '' after a match. */
  flush(): MatcherPiece {
    const piece = this.#matcher.push(this.#detokenizer.flush());
    return piece.stop === undefined ? { text: piece.text + this.#matcher.flush() } : piece;
  }
}

export interface DecodeOptions {
  /** Leaves special tokens out. Defaults to true. */
  readonly skipSpecialTokens?: boolean | undefined;
}

const DECODE_RULES: check.Rules<DecodeOptions> = { skipSpecialTokens: check.boolean };

/**
 * Token ids to the whole text.
 * @throws TurbomindError ERR_TM_INVALID_ARGUMENT for what is no token id, ERR_TM_INVALID_OPTION.
 */
export function decodeIds(
  tokenizer: Tokenizer,
  ids: Iterable<number>,
  options: DecodeOptions,
): string {
  check.checkOptions<DecodeOptions>('decode options', options, DECODE_RULES);
  const stream = new TextStream(tokenizer, options);
  let text = '';
  for (const id of iterable(ids)) {
    if (!Number.isInteger(id) || id < 0) throw notIds(id);
    text += stream.push(id).text;
  }
  return text + stream.flush().text;
}

// Types may lie in plain JavaScript.
function iterable(ids: Iterable<number>): Iterable<number> {
  if (typeof ids === 'object' && ids !== null && Symbol.iterator in ids) return ids;
  throw notIds(ids);
}

function notIds(given: unknown): TurbomindError {
  const message = `decode: ${String(given)} is not a token id; expected a list of ids from 0 on`;
  return new TurbomindError('ERR_TM_INVALID_ARGUMENT', message);
}
