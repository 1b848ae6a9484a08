// Finds stop strings of any length in streamed text, in time linear in the text. Knows nothing of
// tokens. Runs on the JS thread; one object per request.

import { TurbomindError } from './errors.js';

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
