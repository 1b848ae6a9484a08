// Checks of option objects: unknown keys name the nearest right one, values are checked against a
// rule each, messages name the option, the value and what is expected. Pure functions.
import { TurbomindError } from './errors.js';

/** Returns what is expected when `value` is wrong, else undefined. */
export type Rule = (value: unknown) => string | undefined;

/** One rule for every option there is; its keys are the known options. */
export type Rules<T> = { readonly [K in keyof T]-?: Rule };

/** @throws TurbomindError ERR_TM_INVALID_OPTION at the first unknown key or wrong value. */
export function checkOptions<T extends object>(
  name: string,
  options: unknown,
  rules: Rules<T>,
): asserts options is T {
  if (!isOptionObject(options)) {
    throw invalidOption(name, options, 'an object');
  }
  const byName = new Map<string, Rule>(Object.entries(rules));
  for (const [key, value] of Object.entries(options)) {
    const rule = byName.get(key);
    if (rule === undefined) throw unknownOption(name, key, [...byName.keys()]);
    if (value === undefined) continue;
    const expected = rule(value);
    if (expected !== undefined) throw invalidOption(key, value, expected);
  }
}

// A promise or a list has no options of its own: who passes one has forgotten something.
function isOptionObject(options: unknown): options is object {
  if (typeof options !== 'object' || options === null) return false;
  return !(Symbol.iterator in options) && !(options instanceof Promise);
}

/** An ERR_TM_INVALID_OPTION that names the option, its value and what is expected. */
export function invalidOption(key: string, value: unknown, expected: string): TurbomindError {
  const message = `${key}: ${show(value)} is not valid; expected ${expected}`;
  return new TurbomindError('ERR_TM_INVALID_OPTION', message);
}

function unknownOption(name: string, key: string, known: readonly string[]): TurbomindError {
  const nearest = nearestName(key, known);
  const hint = nearest ? `did you mean ${nearest}?` : `known options: ${known.join(', ')}`;
  return new TurbomindError('ERR_TM_INVALID_OPTION', `${name}: unknown option ${key}; ${hint}`);
}

/** The known name for `key`: another library's word for it, or the one few edits away. */
export function nearestName(key: string, known: readonly string[]): string | undefined {
  const plain = normalise(key);
  const alias = ALIASES.get(plain);
  if (alias !== undefined && known.includes(alias)) return alias;
  let best: string | undefined;
  let bestDistance = Math.max(2, Math.floor(plain.length / 3)) + 1;
  for (const candidate of known) {
    const distance = editDistance(plain, normalise(candidate));
    if (distance < bestDistance) {
      best = candidate;
      bestDistance = distance;
    }
  }
  return best;
}

// Names of other libraries for the same thing, letters only.
const ALIASES: ReadonlyMap<string, string> = new Map([
  ['maxtokens', 'maxNewTokens'],
  ['maxcompletiontokens', 'maxNewTokens'],
  ['maxlength', 'maxNewTokens'],
  ['seed', 'randomSeed'],
  ['stop', 'stopWords'],
  ['contextsize', 'sessionLen'],
  ['contextlength', 'sessionLen'],
  ['maxmodellen', 'sessionLen'],
  ['numthreads', 'threads'],
  ['abortsignal', 'signal'],
]);

function normalise(name: string): string {
  return name.toLowerCase().replace(/[^a-z0-9]/g, '');
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, index) => index);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const substituted = (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(substituted, (row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1));
    }
    row = next;
  }
  return row[b.length] ?? 0;
}

function show(value: unknown): string {
  if (typeof value === 'string')
    return JSON.stringify(value.length > 60 ? `${value.slice(0, 57)}…` : value);
  if (typeof value === 'bigint') return `${value}n`;
  if (Array.isArray(value))
    return value.length > 8 ? `a list of ${value.length}` : `[${value.map(show).join(', ')}]`;
  if (typeof value === 'function') return 'a function';
  if (typeof value === 'object' && value !== null)
    return `an object (${value.constructor?.name ?? 'null prototype'})`;
  return String(value);
}

/** The largest count that the addon's 32-bit integers hold. */
export const MAX_INT32: number = 2 ** 31 - 1;

/** An integer in [min, max]. */
export function integer(min: number, max: number = Number.MAX_SAFE_INTEGER): Rule {
  const range = max === Number.MAX_SAFE_INTEGER ? `of at least ${min}` : `from ${min} to ${max}`;
  return (value) =>
    typeof value === 'number' && Number.isInteger(value) && value >= min && value <= max
      ? undefined
      : `an integer ${range}`;
}

/** A finite number for which `holds`; `range` says it in words. */
export function number(range: string, holds: (value: number) => boolean): Rule {
  return (value) =>
    typeof value === 'number' && Number.isFinite(value) && holds(value)
      ? undefined
      : `a number ${range}`;
}

export const boolean: Rule = (value) => (typeof value === 'boolean' ? undefined : 'true or false');

export const text: Rule = (value) =>
  typeof value === 'string' && value.length > 0 ? undefined : 'a text that is not empty';

export const callback: Rule = (value) => (typeof value === 'function' ? undefined : 'a function');

export const abortSignal: Rule = (value) =>
  value instanceof AbortSignal ? undefined : 'an AbortSignal';

/** A list whose items all pass `rule`. */
export function listOf(rule: Rule, most: number): Rule {
  return (value) => {
    if (!Array.isArray(value)) return `a list (${rule(undefined)} each)`;
    if (value.length > most) return `at most ${most} items`;
    return value.map(rule).find((expected) => expected !== undefined);
  };
}

/** Either rule. */
export function either(first: Rule, second: Rule): Rule {
  return (value) => {
    const expected = first(value);
    return expected === undefined || second(value) === undefined
      ? undefined
      : `${expected}, or ${second(value)}`;
  };
}

/** Exactly this value. */
export function exactly(wanted: number | null, wording: string): Rule {
  return (value) => (value === wanted ? undefined : wording);
}

/** One of these texts. */
export function oneOf(...values: readonly string[]): Rule {
  return (value) =>
    typeof value === 'string' && values.includes(value)
      ? undefined
      : values.map((each) => JSON.stringify(each)).join(', ');
}
