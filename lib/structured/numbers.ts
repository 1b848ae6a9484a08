// Numbers of JSON between bounds, digit by digit. A number is written with at most 15 digits before
// the point and as many behind it as a double can tell apart, so that the text read back as a
// double keeps the bounds. Pure functions.
import { choice, EMPTY, type Pattern, repeat, sequence, set, text } from './pattern.js';

/** Bounds of a number; exclusive ones are left out of it. */
export interface NumberBounds {
  readonly min: number;
  readonly isMinExclusive: boolean;
  readonly max: number;
  readonly isMaxExclusive: boolean;
}

export const UNBOUNDED: NumberBounds = {
  min: Number.NEGATIVE_INFINITY,
  isMinExclusive: false,
  max: Number.POSITIVE_INFINITY,
  isMaxExclusive: false,
};

/** Doubles tell all decimals of 15 digits apart. */
const SURE_DIGITS = 15;
const LARGEST = 10 ** SURE_DIGITS - 1;
const WHOLE_FROM = 10 ** 9;

const ANY_DIGIT = set('0123456789');
const WHOLE: Pattern = choice(text('0'), sequence(set('123456789'), repeat(ANY_DIGIT, 0, 14)));

/** Any number: 15 digits, a fraction, an exponent of up to two digits. */
export const ANY_NUMBER: Pattern = sequence(
  choice(EMPTY, text('-')),
  WHOLE,
  choice(EMPTY, sequence('.', repeat(ANY_DIGIT, 1, 15))),
  choice(EMPTY, sequence(set('eE'), choice(EMPTY, set('+-')), repeat(ANY_DIGIT, 1, 2))),
);

/** Whole numbers between bounds; undefined when there is none. */
export function integersBetween(bounds: NumberBounds): Pattern | undefined {
  const low = Math.max(-LARGEST, ceil(bounds.min, bounds.isMinExclusive));
  const high = Math.min(LARGEST, floor(bounds.max, bounds.isMaxExclusive));
  if (low > high) return undefined;
  const parts: Pattern[] = [];
  if (high >= 0) parts.push(naturalsBetween(Math.max(low, 0), high));
  if (low < 0) parts.push(sequence('-', naturalsBetween(Math.max(-high, 1), -low)));
  return choice(...parts);
}

/** Smallest whole number allowed from below. */
export function ceil(min: number, isExclusive: boolean): number {
  const whole = Math.ceil(min);
  return isExclusive && whole === min ? whole + 1 : whole;
}

/** Greatest whole number allowed from above. */
export function floor(max: number, isExclusive: boolean): number {
  const whole = Math.floor(max);
  return isExclusive && whole === max ? whole - 1 : whole;
}

// 0 <= low <= high: one branch for each number of digits.
function naturalsBetween(low: number, high: number): Pattern {
  const parts: Pattern[] = [];
  const most = String(high).length;
  for (let digits = String(low).length; digits <= most; digits += 1) {
    const from = digits === String(low).length ? String(low) : `1${'0'.repeat(digits - 1)}`;
    const to = digits === most ? String(high) : '9'.repeat(digits);
    parts.push(digitsBetween(from, to));
  }
  return choice(...parts);
}

// Texts of as many digits as both have.
function digitsBetween(from: string, to: string): Pattern {
  const [a, b] = [Number(from[0]), Number(to[0])];
  const [restA, restB] = [from.slice(1), to.slice(1)];
  if (restA === '') return digits(a, b);
  const free = repeat(ANY_DIGIT, restA.length, restA.length);
  if (a === b) return sequence(digits(a, a), digitsBetween(restA, restB));
  const fromAll = /^0*$/.test(restA);
  const toAll = /^9*$/.test(restB);
  const inner: Pattern[] = [];
  if (!fromAll) inner.push(sequence(digits(a, a), digitsBetween(restA, '9'.repeat(restA.length))));
  const [first, last] = [fromAll ? a : a + 1, toAll ? b : b - 1];
  if (first <= last) inner.push(sequence(digits(first, last), free));
  if (!toAll) inner.push(sequence(digits(b, b), digitsBetween('0'.repeat(restB.length), restB)));
  return choice(...inner);
}

function digits(first: number, last: number): Pattern {
  return set([[0x30 + first, 0x30 + last]]);
}

/** A bound as a whole part and the digits behind the point. */
interface Decimal {
  readonly whole: number;
  /** Without zeros at its end. */
  readonly fraction: string;
}

/**
 * Numbers between bounds, at most one of them infinite; with at most `maxFraction` digits behind
 * the point. undefined when there is none.
 */
export function numbersBetween(
  bounds: NumberBounds,
  maxFraction: number = Number.POSITIVE_INFINITY,
): Pattern | undefined {
  const { min, max, isMinExclusive, isMaxExclusive } = bounds;
  if (min > max || (min === max && (isMinExclusive || isMaxExclusive))) return undefined;
  const parts: Pattern[] = [];
  if (max >= 0) {
    const from = min < 0 ? { value: 0, isOut: false } : { value: min, isOut: isMinExclusive };
    const part = magnitudes(from, { value: max, isOut: isMaxExclusive }, maxFraction);
    if (part !== undefined) parts.push(part);
  }
  if (min < 0) {
    // Minus nought is nought, which stands above.
    const from = max >= 0 ? { value: 0, isOut: true } : { value: -max, isOut: isMaxExclusive };
    const part = magnitudes(from, { value: -min, isOut: isMinExclusive }, maxFraction);
    if (part !== undefined) parts.push(sequence('-', part));
  }
  return parts.length === 0 ? undefined : choice(...parts);
}

interface Bound {
  readonly value: number;
  readonly isOut: boolean;
}

// Numbers from 0 on between two bounds.
function magnitudes(from: Bound, to: Bound, maxFraction: number): Pattern | undefined {
  if (to.value > LARGEST) return endless(from, maxFraction);
  const low = toDecimal(from.value);
  const high = toDecimal(to.value);
  const isHighOut = to.isOut;
  if (low.whole > high.whole) return undefined;
  const numWhole = String(high.whole).length;
  const behind = Math.max(low.fraction.length, high.fraction.length);
  const room = Math.min(
    maxFraction,
    Math.max(behind, Math.min(SURE_DIGITS - numWhole, behind + 6)),
  );
  if (low.fraction.length > room || high.fraction.length > room) return undefined;
  const fractions = new Fractions(room);
  const parts: (Pattern | undefined)[] = [];
  if (low.whole === high.whole) {
    const inside = fractions.between(low.fraction, from.isOut, high.fraction, isHighOut);
    parts.push(inside && sequence(String(low.whole), inside));
  } else {
    const above = fractions.atLeast(low.fraction, from.isOut);
    parts.push(above && sequence(String(low.whole), above));
    if (low.whole + 1 <= high.whole - 1) {
      parts.push(sequence(naturalsBetween(low.whole + 1, high.whole - 1), fractions.any()));
    }
    const below = fractions.atMost(high.fraction, isHighOut);
    parts.push(below && sequence(String(high.whole), below));
  }
  const found = parts.filter((part): part is Pattern => part !== undefined);
  return found.length === 0 ? undefined : choice(...found);
}

// Without an upper bound: fractions below a thousand million, whole numbers from there on.
function endless(from: Bound, maxFraction: number): Pattern | undefined {
  const first = ceil(Math.max(from.value, WHOLE_FROM), from.isOut && from.value >= WHOLE_FROM);
  if (first > LARGEST) return undefined;
  const whole = naturalsBetween(first, LARGEST);
  const low = magnitudes(from, { value: WHOLE_FROM, isOut: true }, maxFraction);
  return from.value >= WHOLE_FROM || low === undefined ? whole : choice(low, whole);
}

function toDecimal(value: number): Decimal {
  const [whole = '0', fraction = ''] = plain(value).split('.');
  return { whole: Number(whole), fraction: fraction.replace(/0+$/, '') };
}

// 1e-7 → 0.0000001
function plain(value: number): string {
  const shown = String(value);
  const [, digit = '', more = '', exponent = ''] = /^(\d)(?:\.(\d+))?e-(\d+)$/.exec(shown) ?? [];
  if (exponent === '') return shown;
  return `0.${'0'.repeat(Number(exponent) - 1)}${digit}${more}`;
}

/** What may stand behind the whole part: nothing, or a point and digits. */
class Fractions {
  readonly #room: number;

  constructor(room: number) {
    this.#room = room;
  }

  any(): Pattern {
    return this.#room === 0
      ? EMPTY
      : choice(EMPTY, sequence('.', repeat(ANY_DIGIT, 1, this.#room)));
  }

  atLeast(low: string, isOut: boolean): Pattern | undefined {
    if (low === '' && !isOut) return this.any();
    const tail = this.#above(low, isOut, this.#room);
    return tail && sequence('.', tail);
  }

  atMost(high: string, isOut: boolean): Pattern | undefined {
    const tail = high === '' ? undefined : this.#below(high, isOut, this.#room);
    if (high === '') return isOut ? undefined : EMPTY;
    return tail === undefined ? EMPTY : choice(EMPTY, sequence('.', tail));
  }

  between(low: string, isLowOut: boolean, high: string, isHighOut: boolean): Pattern | undefined {
    const size = Math.max(low.length, high.length);
    const [a, b] = [low.padEnd(size, '0'), high.padEnd(size, '0')];
    if (a > b || (a === b && (isLowOut || isHighOut))) return undefined;
    if (high === '') return EMPTY; // both bounds are this whole number
    const parts: Pattern[] = [];
    if (low === '' && !isLowOut) parts.push(EMPTY);
    const tail = this.#inside(low, isLowOut, high, isHighOut, this.#room);
    if (tail !== undefined) parts.push(sequence('.', tail));
    return parts.length === 0 ? undefined : choice(...parts);
  }

  // Digits that make up more than `low`; `room` digits are left.
  #above(low: string, isOut: boolean, room: number): Pattern | undefined {
    if (low === '') {
      if (!isOut) return repeat(ANY_DIGIT, 0, room);
      return room === 0 ? undefined : nonZero(room);
    }
    const digit = Number(low[0]);
    const parts: Pattern[] = [];
    if (digit < 9) parts.push(sequence(digits(digit + 1, 9), repeat(ANY_DIGIT, 0, room - 1)));
    const rest = this.#above(low.slice(1), isOut, room - 1);
    if (rest !== undefined) parts.push(sequence(digits(digit, digit), rest));
    return parts.length === 0 ? undefined : choice(...parts);
  }

  // At least one digit, together less than `high`, which ends with a digit that counts.
  #below(high: string, isOut: boolean, room: number): Pattern | undefined {
    const digit = Number(high[0]);
    const parts: Pattern[] = [];
    if (digit > 0) parts.push(sequence(digits(0, digit - 1), repeat(ANY_DIGIT, 0, room - 1)));
    const rest = high.slice(1);
    if (rest !== '') {
      const tail = this.#below(rest, isOut, room - 1);
      parts.push(sequence(digits(digit, digit), tail === undefined ? EMPTY : choice(EMPTY, tail)));
    } else if (!isOut) {
      parts.push(sequence(digits(digit, digit), repeat(text('0'), 0, room - 1)));
    }
    return parts.length === 0 ? undefined : choice(...parts);
  }

  #inside(
    low: string,
    isLowOut: boolean,
    high: string,
    isHighOut: boolean,
    room: number,
  ): Pattern | undefined {
    if (high === '') return undefined;
    if (low === '' && !isLowOut) return this.#below(high, isHighOut, room);
    const [a, b] = [Number(low[0] ?? '0'), Number(high[0])];
    const [restA, restB] = [low.slice(1), high.slice(1)];
    const parts: (Pattern | undefined)[] = [];
    if (a === b) {
      const both =
        restB === '' && restA === '' && !isLowOut && !isHighOut
          ? repeat(text('0'), 0, room - 1)
          : this.#inside(restA, isLowOut, restB, isHighOut, room - 1);
      const ends = restA === '' && low !== '' && !isLowOut ? EMPTY : undefined;
      const tails = [both, ends].filter((tail): tail is Pattern => tail !== undefined);
      parts.push(tails.length === 0 ? undefined : sequence(digits(a, a), choice(...tails)));
    } else {
      const above = this.#above(restA, isLowOut, room - 1);
      parts.push(above && sequence(digits(a, a), above));
      if (a + 1 <= b - 1) {
        parts.push(sequence(digits(a + 1, b - 1), repeat(ANY_DIGIT, 0, room - 1)));
      }
      const below = restB === '' ? undefined : this.#below(restB, isHighOut, room - 1);
      const ends = restB !== '' || !isHighOut ? EMPTY : undefined;
      const tails = [ends, below].filter((tail): tail is Pattern => tail !== undefined);
      parts.push(tails.length === 0 ? undefined : sequence(digits(b, b), choice(...tails)));
    }
    const found = parts.filter((part): part is Pattern => part !== undefined);
    return found.length === 0 ? undefined : choice(...found);
  }
}

// Digits of which one is not 0.
function nonZero(room: number): Pattern {
  const choices: Pattern[] = [];
  for (let zeros = 0; zeros < room; zeros += 1) {
    const zero = text('0'.repeat(zeros));
    choices.push(sequence(zero, set('123456789'), repeat(ANY_DIGIT, 0, room - zeros - 1)));
  }
  return choice(...choices);
}
