// Regular expressions → patterns. The language is ECMAScript's with the `u` flag, less what no
// grammar can follow token by token: look-around, back references and word boundaries. A pattern
// is held against the whole text, as if it stood between ^ and $. Pure functions.
import { type CharSet, charSet, charsOf, complement, type Range, union } from './char-set.js';
import { choice, EMPTY, type Pattern, repeat, sequence, set } from './pattern.js';

/** Where and why a regular expression was refused. */
export class RegexError extends Error {}

/** Repetitions above this make grammars that take minutes to compile. */
const MAX_REPEAT = 10_000;
const MAX_DEPTH = 200;

const DIGIT = charsOf('0123456789');
const WORD = charSet([
  [0x30, 0x39],
  [0x41, 0x5a],
  [0x5f, 0x5f],
  [0x61, 0x7a],
]);
const SPACE = charSet([
  [0x09, 0x0d],
  [0x20, 0x20],
  [0xa0, 0xa0],
  [0x1680, 0x1680],
  [0x2000, 0x200a],
  [0x2028, 0x2029],
  [0x202f, 0x202f],
  [0x205f, 0x205f],
  [0x3000, 0x3000],
  [0xfeff, 0xfeff],
]);
const LINE_ENDS = charSet([
  [0x0a, 0x0a],
  [0x0d, 0x0d],
  [0x2028, 0x2029],
]);

const CLASSES: ReadonlyMap<string, CharSet> = new Map([
  ['d', DIGIT],
  ['D', complement(DIGIT)],
  ['w', WORD],
  ['W', complement(WORD)],
  ['s', SPACE],
  ['S', complement(SPACE)],
]);

const CONTROLS: ReadonlyMap<string, number> = new Map([
  ['t', 0x09],
  ['n', 0x0a],
  ['v', 0x0b],
  ['f', 0x0c],
  ['r', 0x0d],
  ['0', 0x00],
]);

/** @throws RegexError */
export function parseRegex(source: string): Pattern {
  return new RegexParser(source).parse();
}

class RegexParser {
  readonly #chars: readonly string[];
  #at = 0;
  #depth = 0;

  constructor(source: string) {
    this.#chars = [...source];
  }

  parse(): Pattern {
    const pattern = this.#alternatives();
    if (this.#at < this.#chars.length) throw this.#error('a ) without its (');
    return pattern;
  }

  #alternatives(): Pattern {
    this.#depth += 1;
    if (this.#depth > MAX_DEPTH) throw this.#error('groups are nested too deeply');
    const items = [this.#concatenation()];
    while (this.#take('|')) items.push(this.#concatenation());
    this.#depth -= 1;
    return choice(...items);
  }

  #concatenation(): Pattern {
    const items: Pattern[] = [];
    // Anchors say what holds anyway; elsewhere nothing could match.
    if (this.#depth === 1) this.#take('^');
    while (this.#at < this.#chars.length && !this.#sees('|') && !this.#sees(')')) {
      if (this.#sees('$') && this.#depth === 1 && this.#endsAt(this.#at + 1)) {
        this.#at += 1;
        break;
      }
      items.push(this.#quantified(this.#atom()));
    }
    return items.length === 0 ? EMPTY : sequence(...items);
  }

  #endsAt(index: number): boolean {
    const char = this.#chars[index];
    return char === undefined || char === '|';
  }

  #atom(): Pattern {
    const char = this.#chars[this.#at];
    this.#at += 1;
    switch (char) {
      case '.':
        return set(complement(LINE_ENDS));
      case '(':
        return this.#group();
      case '[':
        return set(this.#characterClass());
      case '\\':
        return set(this.#escape(false));
      case '^':
      case '$':
        throw this.#error(`${char} inside the expression; the whole text is matched anyway`);
      case '*':
      case '+':
      case '?':
      case '{':
        throw this.#error(`${char} with nothing to repeat`);
      case '}':
      case ']':
        throw this.#error(`${char} must be written \\${char}`);
      default:
        return set(charsOf(char ?? ''));
    }
  }

  #group(): Pattern {
    if (this.#take('?')) {
      if (this.#take('<') && !this.#sees('=') && !this.#sees('!')) {
        const end = this.#chars.indexOf('>', this.#at);
        const name = this.#chars.slice(this.#at, end).join('');
        if (end < 0 || !/^[\p{L}_$][\p{L}\p{N}_$]*$/u.test(name)) {
          throw this.#error('a group without a name');
        }
        this.#at = end + 1;
      } else if (!this.#take(':')) {
        throw this.#error('look-around and modifiers are not supported');
      }
    }
    const pattern = this.#alternatives();
    if (!this.#take(')')) throw this.#error('a ( without its )');
    return pattern;
  }

  #quantified(item: Pattern): Pattern {
    const bounds = this.#quantifier();
    if (bounds === undefined) return item;
    this.#take('?'); // lazy or greedy: the same texts
    if (this.#sees('*') || this.#sees('+') || this.#sees('?') || this.#sees('{')) {
      throw this.#error('a repetition of a repetition; use a group');
    }
    return repeat(item, bounds[0], bounds[1]);
  }

  #quantifier(): readonly [min: number, max: number] | undefined {
    if (this.#take('*')) return [0, Number.POSITIVE_INFINITY];
    if (this.#take('+')) return [1, Number.POSITIVE_INFINITY];
    if (this.#take('?')) return [0, 1];
    if (!this.#sees('{')) return undefined;
    const end = this.#chars.indexOf('}', this.#at);
    const body = end < 0 ? '' : this.#chars.slice(this.#at + 1, end).join('');
    const [, low, comma, high] = /^(\d+)(,(\d*))?$/.exec(body) ?? [];
    if (low === undefined) throw this.#error('{ must be written \\{, or be a repetition {n,m}');
    const min = Number(low);
    const max =
      comma === undefined ? min : high === '' || !high ? Number.POSITIVE_INFINITY : Number(high);
    if (min > max) throw this.#error(`{${body}} goes from more to fewer`);
    if (min > MAX_REPEAT || (max > MAX_REPEAT && max !== Number.POSITIVE_INFINITY)) {
      throw this.#error(`{${body}} is above the limit of ${MAX_REPEAT}`);
    }
    this.#at = end + 1;
    return [min, max];
  }

  #characterClass(): CharSet {
    const isNegated = this.#take('^');
    const parts: CharSet[] = [];
    while (!this.#take(']')) {
      const first = this.#classMember();
      const isRange = this.#sees('-') && this.#chars[this.#at + 1] !== ']';
      if (!isRange) {
        parts.push(first);
        continue;
      }
      this.#at += 1;
      parts.push([this.#range(first, this.#classMember())]);
    }
    const all = charSet(union(...parts));
    return isNegated ? complement(all) : all;
  }

  #range(first: CharSet, last: CharSet): Range {
    const [from, to] = [singleOf(first), singleOf(last)];
    if (from === undefined || to === undefined) throw this.#error('a range needs two characters');
    if (from > to) throw this.#error('a range goes from more to less');
    return [from, to];
  }

  #classMember(): CharSet {
    const char = this.#chars[this.#at];
    if (char === undefined) throw this.#error('a [ without its ]');
    this.#at += 1;
    return char === '\\' ? this.#escape(true) : charsOf(char);
  }

  #escape(isInClass: boolean): CharSet {
    const char = this.#chars[this.#at] ?? '';
    this.#at += 1;
    const known = CLASSES.get(char);
    if (known !== undefined) return known;
    const control = CONTROLS.get(char);
    if (control !== undefined) {
      if (char === '0' && /\d/.test(this.#chars[this.#at] ?? '')) {
        throw this.#error('octal escapes are not supported');
      }
      return [[control, control]];
    }
    if (isInClass && char === 'b') return [[8, 8]];
    if (char === 'x') return this.#codePoint(this.#hex(2));
    if (char === 'u') return this.#codePoint(this.#unicode());
    if (char === '' || /[A-Za-z0-9]/.test(char)) {
      throw this.#error(`\\${char} is not supported`);
    }
    return charsOf(char);
  }

  #unicode(): number {
    if (!this.#take('{')) {
      const unit = this.#hex(4);
      const isHigh = unit >= 0xd800 && unit < 0xdc00;
      if (!isHigh || this.#chars[this.#at] !== '\\' || this.#chars[this.#at + 1] !== 'u')
        return unit;
      this.#at += 2;
      return 0x10000 + ((unit - 0xd800) << 10) + (this.#hex(4) - 0xdc00);
    }
    const end = this.#chars.indexOf('}', this.#at);
    const digits = end < 0 ? '' : this.#chars.slice(this.#at, end).join('');
    if (!/^[0-9a-fA-F]{1,6}$/.test(digits)) throw this.#error('\\u{ needs hex digits and }');
    this.#at = end + 1;
    return Number.parseInt(digits, 16);
  }

  #hex(count: number): number {
    const digits = this.#chars.slice(this.#at, this.#at + count).join('');
    if (!new RegExp(`^[0-9a-fA-F]{${count}}$`).test(digits)) {
      throw this.#error(`an escape needs ${count} hex digits`);
    }
    this.#at += count;
    return Number.parseInt(digits, 16);
  }

  #codePoint(value: number): CharSet {
    const chars = charSet([[value, value]]);
    if (value > 0x10ffff || chars.length === 0) {
      throw this.#error(`U+${value.toString(16).toUpperCase()} is not a character`);
    }
    return chars;
  }

  #sees(char: string): boolean {
    return this.#chars[this.#at] === char;
  }

  #take(char: string): boolean {
    if (!this.#sees(char)) return false;
    this.#at += 1;
    return true;
  }

  #error(problem: string): RegexError {
    return new RegexError(`at position ${Math.min(this.#at, this.#chars.length)}: ${problem}`);
  }
}

function singleOf(chars: CharSet): number | undefined {
  const [range, ...others] = chars;
  return range !== undefined && others.length === 0 && range[0] === range[1] ? range[0] : undefined;
}
