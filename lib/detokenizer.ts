// Token ids to text, one by one: never half a character, and never text behind a stop string.
// Runs on the JS thread; one object per request; work is linear in the text.

import { TurbomindError } from './errors.js';
import type { Tokenizer } from './tokenizer.js';

export interface DetokenizerOptions {
  /** Leave out special tokens. Default true. */
  readonly skipSpecialTokens?: boolean;
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
    this.#stripNext = tokenizer.stripsLeadingSpace;
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

/** What StopMatcher gives for a piece of text. */
export interface MatcherPiece {
  /** Text that cannot be part of a stop string any more; ends before the match if there is one. */
  readonly text: string;
  /** The stop string found, the longest of those that end at the same place. */
  readonly stop?: string;
}

/**
 * Finds the first of some stop strings in streamed text and holds back exactly what may be the
 * beginning of one: an Aho-Corasick automaton over UTF-16 units. The text held back always is a
 * prefix of a stop string, so nothing is buffered.
 *
 * @example
 * const matcher = new StopMatcher(['END']);
 * matcher.push('the E'); // { text: 'the ' }
 * matcher.push('ND.');   // { text: '', stop: 'END' }
 */
export class StopMatcher {
  readonly #stops: readonly string[];
  /** Child of a node by unit: node × 65536 + unit → node. */
  readonly #children = new Map<number, number>();
  readonly #fail: number[] = [0];
  readonly #depth: number[] = [0];
  /** A stop string that goes through the node: its first `depth` units spell the node. */
  readonly #through: number[] = [0];
  /** The longest stop string that ends at the node, -1 for none. */
  readonly #ends: number[] = [-1];
  #node = 0;
  #found: string | undefined;

  constructor(stops: readonly string[]) {
    if (stops.includes('')) {
      throw new TurbomindError('ERR_TM_INVALID_OPTION', 'a stop string is empty');
    }
    this.#stops = stops;
    for (const [index, stop] of stops.entries()) this.#insert(stop, index);
    this.#link();
  }

  #insert(stop: string, index: number): void {
    let node = 0;
    for (let position = 0; position < stop.length; position += 1) {
      const key = edge(node, stop.charCodeAt(position));
      let child = this.#children.get(key);
      if (child === undefined) {
        child = this.#depth.length;
        this.#children.set(key, child);
        this.#depth.push(position + 1);
        this.#through.push(index);
        this.#ends.push(-1);
        this.#fail.push(0);
      }
      node = child;
    }
    this.#ends[node] = index;
  }

  /** Fail links, breadth first: the node of the longest proper suffix. */
  #link(): void {
    const edges = [...this.#children].map(([key, child]) => ({ key, child }));
    edges.sort((a, b) => this.#depthOf(a.child) - this.#depthOf(b.child));
    for (const { key, child } of edges) {
      const parent = Math.floor(key / UNITS);
      const fail = parent === 0 ? 0 : this.#step(this.#fail[parent] ?? 0, key % UNITS);
      this.#fail[child] = fail;
      if (this.#ends[child] === -1) this.#ends[child] = this.#ends[fail] ?? -1;
    }
  }

  #depthOf(node: number): number {
    return this.#depth[node] ?? 0;
  }

  #step(from: number, unit: number): number {
    let node = from;
    for (;;) {
      const child = this.#children.get(edge(node, unit));
      if (child !== undefined) return child;
      if (node === 0) return 0;
      node = this.#fail[node] ?? 0;
    }
  }

  /** After a match every further push returns ''. */
  push(text: string): MatcherPiece {
    if (this.#found !== undefined) return { text: '' };
    if (this.#stops.length === 0) return { text };
    const before = this.#node;
    for (let position = 0; position < text.length; position += 1) {
      this.#node = this.#step(this.#node, text.charCodeAt(position));
      const stop = this.#stops[this.#ends[this.#node] ?? -1];
      if (stop !== undefined) {
        this.#found = stop;
        return { text: this.#release(before, text, position + 1 - stop.length), stop };
      }
    }
    return { text: this.#release(before, text, text.length - this.#depthOf(this.#node)) };
  }

  /** The text held back, at the end of the answer. */
  flush(): string {
    const held = this.#found === undefined ? this.#held(this.#node) : '';
    this.#node = 0;
    return held;
  }

  /** What was held at `before`, then `text`, up to `end` (counted from the start of `text`). */
  #release(before: number, text: string, end: number): string {
    const held = this.#held(before);
    return end >= 0 ? held + text.slice(0, end) : held.slice(0, held.length + end);
  }

  #held(node: number): string {
    return node === 0
      ? ''
      : (this.#stops[this.#through[node] ?? 0] ?? '').slice(0, this.#depthOf(node));
  }
}

const UNITS = 0x10000;

function edge(node: number, unit: number): number {
  return node * UNITS + unit;
}

export interface StopMatch {
  /** The stop string that was found. */
  readonly stop: string;
  /** Index, among the tokens pushed, of the token that completed it. */
  readonly tokenIndex: number;
}

export interface TextPiece {
  /** Text that can be shown now; '' while characters are held back. */
  readonly text: string;
  readonly match?: StopMatch;
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
 *   const { text, match } = stream.push(id);
 *   show(text);
 *   if (match) break;
 * }
 * show(stream.flush().text);
 */
export class TextStream {
  readonly #detokenizer: Detokenizer;
  readonly #matcher: StopMatcher;
  #numTokens = 0;

  constructor(tokenizer: Tokenizer, options: TextStreamOptions = {}) {
    this.#detokenizer = new Detokenizer(tokenizer, options);
    this.#matcher = new StopMatcher(options.stopStrings ?? []);
  }

  /** After a match every further push returns ''. */
  push(id: number): TextPiece {
    this.#numTokens += 1;
    return this.#match(this.#detokenizer.push(id));
  }

  /** What was held back, at the end of the answer; '' after a match. */
  flush(): TextPiece {
    const piece = this.#match(this.#detokenizer.flush());
    return piece.match ? piece : { text: piece.text + this.#matcher.flush() };
  }

  #match(text: string): TextPiece {
    const piece = this.#matcher.push(text);
    if (piece.stop === undefined) return { text: piece.text };
    return { text: piece.text, match: { stop: piece.stop, tokenIndex: this.#numTokens - 1 } };
  }
}
