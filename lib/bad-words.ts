// Bad words as token sequences: every way to cut a word, with or without the space before it, into
// tokens of the vocabulary. Limits: a word is recognised where it begins and ends at the borders of
// tokens, so a longer token that holds it (`cat` in `catalog`) is not banned; of words with very
// many spellings the shortest MAX_SPELLINGS are. Runs on the JS thread.
import { TurbomindError } from './errors.js';
import type { Tokenizer } from './tokenizer.js';

/** Spellings of one form of a word; those of fewest tokens come first. */
export const MAX_SPELLINGS = 256;
/** Of all bad words of a request together. */
const MAX_SEQUENCES = 65_536;
/** Bytes; longer tokens are runs of spaces and the like. */
const MAX_TOKEN_BYTES = 64;
/** Tokens looked at between two pauses. */
const SLICE = 4096;

export class BadWordSpeller {
  readonly #tokenizer: Tokenizer;
  readonly #vocabSize: number;
  /** Bytes as Latin-1 → the ids that stand for them. */
  #table: Map<string, number[]> | undefined;

  constructor(tokenizer: Tokenizer, vocabSize: number) {
    this.#tokenizer = tokenizer;
    this.#vocabSize = vocabSize;
  }

  /**
   * The sequences that no completion may hold. `giveWay` is awaited now and then while the table of
   * a large vocabulary is built, the first time.
   *
   * @throws TurbomindError ERR_TM_INVALID_OPTION when the words have too many spellings together.
   */
  async spell(words: readonly string[], giveWay: () => Promise<void>): Promise<number[][]> {
    if (words.length === 0) return [];
    const table = await this.#tableOf(giveWay);
    const sequences = new Map<string, number[]>();
    for (const word of words) {
      // A word inside a text usually carries the space before it in its first token.
      const forms = word.startsWith(' ') ? [word] : [word, ` ${word}`];
      for (const form of forms) {
        for (const ids of [this.#tokenizer.encode(form), ...spellings(bytesOf(form), table)]) {
          if (ids.length > 0) sequences.set(ids.join(), ids);
        }
      }
      if (sequences.size > MAX_SEQUENCES) {
        throw new TurbomindError(
          'ERR_TM_INVALID_OPTION',
          `badWords: ${words.length} words have more than ${MAX_SEQUENCES} spellings; ban fewer words`,
        );
      }
    }
    // What ends with another sequence is banned by that one.
    return [...sequences.values()].filter(
      (ids) => !ids.some((_, start) => start > 0 && sequences.has(ids.slice(start).join())),
    );
  }

  async #tableOf(giveWay: () => Promise<void>): Promise<Map<string, number[]>> {
    if (this.#table !== undefined) return this.#table;
    const table = new Map<string, number[]>();
    const size = Math.min(this.#tokenizer.vocabSize, this.#vocabSize);
    for (let id = 0; id < size; id += 1) {
      if (id % SLICE === SLICE - 1) await giveWay();
      if (this.#tokenizer.isSpecial(id)) continue;
      const bytes = this.#tokenizer.bytesOf(id);
      if (bytes.length === 0 || bytes.length > MAX_TOKEN_BYTES) continue;
      const key = Buffer.from(bytes).toString('latin1');
      const ids = table.get(key);
      if (ids === undefined) table.set(key, [id]);
      else ids.push(id);
    }
    this.#table = table;
    return table;
  }
}

function bytesOf(text: string): string {
  return Buffer.from(text, 'utf8').toString('latin1');
}

/** Cuts of `bytes` into entries of `table`, those of fewest tokens first, at most MAX_SPELLINGS. */
function spellings(bytes: string, table: ReadonlyMap<string, readonly number[]>): number[][] {
  const fewest = fewestTokens(bytes, table);
  const found: number[][] = [];
  const path: number[] = [];
  const visit = (from: number, left: number): void => {
    if (from === bytes.length) found.push([...path]);
    if (left === 0) return;
    for (let end = Math.min(bytes.length, from + MAX_TOKEN_BYTES); end > from; end -= 1) {
      if ((fewest[end] ?? Number.POSITIVE_INFINITY) > left - 1) continue;
      // A cut of fewer tokens than asked for was found in an earlier round.
      if (bytes.length - end < left - 1) continue;
      for (const id of table.get(bytes.slice(from, end)) ?? []) {
        if (found.length >= MAX_SPELLINGS) return;
        path.push(id);
        visit(end, left - 1);
        path.pop();
      }
    }
  };
  const first = fewest[0] ?? Number.POSITIVE_INFINITY;
  for (let count = first; count <= bytes.length && found.length < MAX_SPELLINGS; count += 1) {
    visit(0, count);
  }
  return found;
}

/** For each place the fewest tokens that spell what follows it; infinity where nothing does. */
function fewestTokens(bytes: string, table: ReadonlyMap<string, readonly number[]>): number[] {
  const fewest: number[] = Array.from({ length: bytes.length + 1 }, () => Number.POSITIVE_INFINITY);
  fewest[bytes.length] = 0;
  for (let from = bytes.length - 1; from >= 0; from -= 1) {
    for (let end = from + 1; end <= Math.min(bytes.length, from + MAX_TOKEN_BYTES); end += 1) {
      const rest = (fewest[end] ?? 0) + 1;
      if (rest < (fewest[from] ?? 0) && table.has(bytes.slice(from, end))) fewest[from] = rest;
    }
  }
  return fewest;
}
