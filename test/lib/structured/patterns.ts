// Patterns seen from the other side, for tests: texts drawn from them at random, and whether they
// allow a text, by plain backtracking.
import type { Pattern } from '../../../lib/structured/pattern.js';

export type Rules = ReadonlyMap<string, Pattern>;
export type Random = (below: number) => number;

const NO_RULES: Rules = new Map();

/** Small and seeded, so that a failure can be repeated. */
export function makeRandom(seed: number): Random {
  let state = seed;
  return (below) => {
    state = (Math.imul(state ^ (state >>> 15), 0x2c1b3c6d) + 0x297a2d39) | 0;
    const mixed = Math.imul(state ^ (state >>> 12), 0x85ebca6b);
    return ((mixed ^ (mixed >>> 13)) >>> 0) % below;
  };
}

/** A text that the pattern allows; choices that lead back into rules get rarer with depth. */
export function sample(
  pattern: Pattern,
  random: Random,
  rules: Rules = NO_RULES,
  depth = 0,
): string {
  const below = (each: Pattern): string => sample(each, random, rules, depth + 1);
  switch (pattern.kind) {
    case 'text':
      return pattern.text;
    case 'set': {
      const [first, last] = pattern.set[random(pattern.set.length)] ?? [0x3f, 0x3f];
      const ascii = pattern.set.filter(([from]) => from < 0x7f);
      const [low, high] =
        random(4) > 0 ? (ascii[random(ascii.length || 1)] ?? [first, last]) : [first, last];
      return String.fromCodePoint(low + random(high - low + 1));
    }
    case 'sequence':
      return pattern.items.map(below).join('');
    case 'choice': {
      const sorted = [...pattern.items].sort((a, b) => weight(a) - weight(b));
      const items = depth > 30 ? sorted.slice(0, 1) : sorted;
      return below(items[random(items.length)] ?? pattern);
    }
    case 'repeat': {
      const more = Math.min(pattern.max - pattern.min, depth > 30 ? 0 : 5);
      const count = pattern.min + random(more + 1);
      return Array.from({ length: count }, () => below(pattern.item)).join('');
    }
    case 'rule':
      return sample(
        rules.get(pattern.name) ?? { kind: 'text', text: '' },
        random,
        rules,
        depth + 1,
      );
  }
}

function weight(pattern: Pattern): number {
  return JSON.stringify(pattern).split('"rule"').length;
}

/** Whether the whole text is allowed. For patterns without rules. */
export function allows(pattern: Pattern, text: string): boolean {
  for (const end of ends(pattern, text, 0)) if (end === text.length) return true;
  return false;
}

function* ends(pattern: Pattern, text: string, from: number): Generator<number> {
  switch (pattern.kind) {
    case 'text':
      if (text.startsWith(pattern.text, from)) yield from + pattern.text.length;
      return;
    case 'set': {
      const point = text.codePointAt(from);
      const isIn = pattern.set.some(([a, b]) => point !== undefined && a <= point && point <= b);
      if (isIn && point !== undefined) yield from + (point > 0xffff ? 2 : 1);
      return;
    }
    case 'sequence':
      yield* endsOfAll(pattern.items, 0, text, from);
      return;
    case 'choice':
      for (const item of pattern.items) yield* ends(item, text, from);
      return;
    case 'repeat':
      yield* endsOfRepeat(pattern, 0, text, from);
      return;
    case 'rule':
      throw new Error('rules are not followed');
  }
}

function* endsOfAll(
  items: readonly Pattern[],
  index: number,
  text: string,
  from: number,
): Generator<number> {
  const item = items[index];
  if (item === undefined) yield from;
  else for (const end of ends(item, text, from)) yield* endsOfAll(items, index + 1, text, end);
}

function* endsOfRepeat(
  pattern: Pattern & { readonly kind: 'repeat' },
  count: number,
  text: string,
  from: number,
): Generator<number> {
  if (count >= pattern.min) yield from;
  if (count >= pattern.max) return;
  for (const end of ends(pattern.item, text, from)) {
    if (end > from || count < pattern.min) yield* endsOfRepeat(pattern, count + 1, text, end);
  }
}
