// Sets of Unicode characters as sorted ranges of code points, and their spelling as sequences of
// UTF-8 byte ranges, which is what grammars over tokens are made of. Pure functions.

/** First and last code point, both in the set. */
export type Range = readonly [first: number, last: number];

/** Disjoint, sorted, without neighbours that touch; never holds surrogates. */
export type CharSet = readonly Range[];

const LAST = 0x10ffff;

/** Every character there is. */
export const ANY: CharSet = [
  [0, 0xd7ff],
  [0xe000, LAST],
];

/** A set of any ranges, in any order; surrogates are left out. */
export function charSet(ranges: readonly Range[]): CharSet {
  return intersect(merge(ranges), ANY);
}

export function charsOf(text: string): CharSet {
  return charSet(
    [...text].map((char): Range => [char.codePointAt(0) ?? 0, char.codePointAt(0) ?? 0]),
  );
}

export function union(...sets: readonly CharSet[]): CharSet {
  return merge(sets.flat());
}

export function complement(set: CharSet): CharSet {
  const out: Range[] = [];
  let next = 0;
  for (const [first, last] of set) {
    if (first > next) out.push([next, first - 1]);
    next = last + 1;
  }
  if (next <= LAST) out.push([next, LAST]);
  return intersect(out, ANY);
}

export function without(set: CharSet, other: CharSet): CharSet {
  return intersect(set, complement(other));
}

export function intersect(a: CharSet, b: CharSet): CharSet {
  const out: Range[] = [];
  for (const [first, last] of a) {
    for (const [from, to] of b) {
      if (from <= last && to >= first) out.push([Math.max(first, from), Math.min(last, to)]);
    }
  }
  return out;
}

export function holds(set: CharSet, codePoint: number): boolean {
  return set.some(([first, last]) => first <= codePoint && codePoint <= last);
}

function merge(ranges: readonly Range[]): CharSet {
  const sorted = [...ranges].sort((a, b) => a[0] - b[0]);
  const out: [number, number][] = [];
  for (const [first, last] of sorted) {
    const previous = out.at(-1);
    if (previous !== undefined && first <= previous[1] + 1) {
      previous[1] = Math.max(previous[1], last);
    } else {
      out.push([first, last]);
    }
  }
  return out;
}

/** Byte ranges one behind the other: any byte of the first, then any of the second… */
export type ByteSequence = readonly Range[];

/** Exactly the UTF-8 forms of the set's characters; sequences are disjoint. */
export function utf8Sequences(set: CharSet): ByteSequence[] {
  return set.flatMap(([first, last]) => splitByLength(first, last));
}

const LAST_OF_LENGTH = [0x7f, 0x7ff, 0xffff, LAST] as const;

function splitByLength(first: number, last: number): ByteSequence[] {
  const out: ByteSequence[] = [];
  let from = first;
  for (const [index, most] of LAST_OF_LENGTH.entries()) {
    const to = Math.min(last, most);
    if (from > to) continue;
    out.push(...splitByPrefix(from, to, index));
    from = to + 1;
  }
  return out;
}

// A range is one sequence when all bytes behind the first that differs go from 80 to BF.
function splitByPrefix(first: number, last: number, numTails: number): ByteSequence[] {
  for (let tails = numTails; tails >= 1; tails -= 1) {
    const mask = 64 ** tails - 1;
    if (Math.floor(first / (mask + 1)) === Math.floor(last / (mask + 1))) continue;
    const overFirst = first % (mask + 1);
    if (overFirst !== 0) {
      const end = first - overFirst + mask;
      return [...splitByPrefix(first, end, numTails), ...splitByPrefix(end + 1, last, numTails)];
    }
    const overLast = last % (mask + 1);
    if (overLast !== mask) {
      const start = last - overLast;
      return [
        ...splitByPrefix(first, start - 1, numTails),
        ...splitByPrefix(start, last, numTails),
      ];
    }
  }
  const low = utf8(first);
  return [utf8(last).map((byte, index): Range => [low[index] ?? byte, byte])];
}

function utf8(codePoint: number): readonly number[] {
  return [...new TextEncoder().encode(String.fromCodePoint(codePoint))];
}
