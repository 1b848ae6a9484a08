// What texts a grammar allows, as a tree: character sets, fixed texts, sequences, choices,
// repetitions and references to named rules. Regular expressions, JSON schemas and choice lists
// all become such trees; grammar-writer.ts spells them for the matcher. Pure functions.
import { ANY, type CharSet, charSet, charsOf, intersect, without } from './char-set.js';

export type Pattern =
  | { readonly kind: 'set'; readonly set: CharSet }
  | { readonly kind: 'text'; readonly text: string }
  | { readonly kind: 'sequence'; readonly items: readonly Pattern[] }
  | { readonly kind: 'choice'; readonly items: readonly Pattern[] }
  | {
      readonly kind: 'repeat';
      readonly item: Pattern;
      readonly min: number;
      /** Infinity: no limit. */
      readonly max: number;
    }
  | { readonly kind: 'rule'; readonly name: string };

export const EMPTY: Pattern = { kind: 'text', text: '' };

export function set(chars: CharSet | string): Pattern {
  return { kind: 'set', set: typeof chars === 'string' ? charsOf(chars) : chars };
}

export function text(value: string): Pattern {
  return { kind: 'text', text: value };
}

export function sequence(...items: readonly (Pattern | string)[]): Pattern {
  const patterns = items.map((item) => (typeof item === 'string' ? text(item) : item));
  return patterns.length === 1 && patterns[0] ? patterns[0] : { kind: 'sequence', items: patterns };
}

export function choice(...items: readonly Pattern[]): Pattern {
  return items.length === 1 && items[0] ? items[0] : { kind: 'choice', items };
}

export function repeat(item: Pattern, min: number, max: number): Pattern {
  return { kind: 'repeat', item, min, max };
}

export function optional(item: Pattern): Pattern {
  return choice(EMPTY, item);
}

export function rule(name: string): Pattern {
  return { kind: 'rule', name };
}

/** Whether a pattern allows the empty text. References count as no: their rules hold JSON values. */
export function isNullable(pattern: Pattern): boolean {
  switch (pattern.kind) {
    case 'set':
    case 'rule':
      return false;
    case 'text':
      return pattern.text === '';
    case 'sequence':
      return pattern.items.every(isNullable);
    case 'choice':
      return pattern.items.some(isNullable);
    case 'repeat':
      return pattern.min === 0 || isNullable(pattern.item);
  }
}

/** The same texts less the empty one: what a repetition may repeat without standing still. */
export function nonEmpty(pattern: Pattern): Pattern {
  if (!isNullable(pattern)) return pattern;
  switch (pattern.kind) {
    case 'choice':
      return choice(...pattern.items.map(nonEmpty));
    case 'sequence':
      return choice(...pattern.items.map((_, index) => startingAt(pattern.items, index)));
    case 'repeat': {
      const item = nonEmpty(pattern.item);
      return sequence(item, repeat(item, 0, pattern.max - 1));
    }
    default:
      return choice(); // the empty text alone: nothing is left
  }
}

// The items before `index` are empty, the one there is not.
function startingAt(items: readonly Pattern[], index: number): Pattern {
  if (!items.slice(0, index).every(isNullable)) return choice();
  return sequence(...items.slice(index).map((item, at) => (at === 0 ? nonEmpty(item) : item)));
}

/** Fewest and most characters; rules count as unbounded. */
export function lengthOf(pattern: Pattern): { readonly min: number; readonly max: number } {
  switch (pattern.kind) {
    case 'set':
      return { min: 1, max: 1 };
    case 'text': {
      const { length } = [...pattern.text];
      return { min: length, max: length };
    }
    case 'rule':
      return { min: 0, max: Number.POSITIVE_INFINITY };
    case 'sequence': {
      const all = pattern.items.map(lengthOf);
      return {
        min: all.reduce((sum, { min }) => sum + min, 0),
        max: all.reduce((sum, { max }) => sum + max, 0),
      };
    }
    case 'choice': {
      const all = pattern.items.map(lengthOf);
      return {
        min: Math.min(...all.map(({ min }) => min)),
        max: Math.max(...all.map(({ max }) => max)),
      };
    }
    case 'repeat': {
      const { min, max } = lengthOf(pattern.item);
      return { min: min * pattern.min, max: max === 0 ? 0 : max * pattern.max };
    }
  }
}

/** True when some text is allowed at all. `rules` are those known to allow one. */
export function isProductive(pattern: Pattern, rules: ReadonlySet<string>): boolean {
  switch (pattern.kind) {
    case 'set':
      return pattern.set.length > 0;
    case 'text':
      return true;
    case 'rule':
      return rules.has(pattern.name);
    case 'sequence':
      return pattern.items.every((item) => isProductive(item, rules));
    case 'choice':
      return pattern.items.some((item) => isProductive(item, rules));
    case 'repeat':
      return pattern.min === 0 || isProductive(pattern.item, rules);
  }
}

/** Characters that stand for themselves inside a JSON string. */
export const JSON_SAFE: CharSet = without(
  ANY,
  charSet([
    [0, 0x1f],
    [0x22, 0x22],
    [0x5c, 0x5c],
  ]),
);

const SHORT_ESCAPES: readonly (readonly [char: string, spelled: string])[] = [
  ['"', '\\"'],
  ['\\', '\\\\'],
  ['\n', '\\n'],
  ['\r', '\\r'],
  ['\t', '\\t'],
  ['\b', '\\b'],
  ['\f', '\\f'],
];

const HEX = set('0123456789abcdefABCDEF');

// Any \uXXXX but halves of surrogate pairs: a character beyond them is written as it is.
const UNICODE_ESCAPE: Pattern = sequence(
  '\\u',
  choice(
    sequence(set('0123456789abcefABCEF'), HEX, HEX, HEX),
    sequence(set('dD'), set('01234567'), HEX, HEX),
  ),
);

/** Any one character of a JSON string, escaped where it must be and where it may be. */
export const JSON_CHAR: Pattern = choice(
  set(JSON_SAFE),
  sequence('\\', set('"\\/bfnrt')),
  UNICODE_ESCAPE,
);

/** The texts of a pattern as they are spelled between the quotes of a JSON string. */
export function asJsonString(pattern: Pattern): Pattern {
  switch (pattern.kind) {
    case 'set': {
      if (pattern.set === ANY) return JSON_CHAR;
      const escapes = SHORT_ESCAPES.filter(
        ([char]) => intersect(pattern.set, charsOf(char)).length,
      );
      const safe = intersect(pattern.set, JSON_SAFE);
      const plain = safe.length > 0 ? [set(safe)] : [];
      return choice(...plain, ...escapes.map(([, spelled]) => text(spelled)));
    }
    case 'text':
      return text(JSON.stringify(pattern.text).slice(1, -1));
    case 'sequence':
      return { kind: 'sequence', items: pattern.items.map(asJsonString) };
    case 'choice':
      return { kind: 'choice', items: pattern.items.map(asJsonString) };
    case 'repeat':
      return { ...pattern, item: asJsonString(pattern.item) };
    case 'rule':
      return pattern;
  }
}
