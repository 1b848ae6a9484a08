// Patterns → EBNF for the matcher. Written right-linear (each character followed by the rule for
// what may come next) and down to UTF-8 bytes: the matcher's own sets of characters above U+007F
// are wrong, and its masks are 200 times faster for a rule that ends with itself than for a
// repetition of a rule. No two alternatives of a rule begin with the same byte range: the matcher
// merges states of such rules that differ, and then allows too much (xgrammar #632, #911). For the
// same reason named rules end with a rule: those without one it copies into others.
// Pure functions; the output depends on the input alone.
import { type ByteSequence, type CharSet, type Range, utf8Sequences } from './char-set.js';
import { factor } from './left-factor.js';
import { isNullable, isProductive, nonEmpty, type Pattern, repeat } from './pattern.js';

/** Longer grammars are refused: compiling them would take minutes and gigabytes. */
const MAX_CHARS = 4 * 2 ** 20;
/** Repetitions above this are counted in blocks, which the matcher compiles once. */
const BLOCK = 64;
const MOST_FLAT = 2 * BLOCK;
/** A rule for nothing. */
const END = 'end';

/** @throws RangeError when the grammar gets too long. */
export function writeGrammar(root: Pattern, rules: ReadonlyMap<string, Pattern>): string {
  return new GrammarWriter(root, rules).toString();
}

/** The alternatives that spell one character of a set. */
export function writeSet(chars: CharSet): string {
  return utf8Sequences(chars).map(spellBytes).join(' | ');
}

/** Names of the rules that allow some text; the others can never be completed. */
export function productiveRules(rules: ReadonlyMap<string, Pattern>): Set<string> {
  const found = new Set<string>();
  for (let before = -1; before !== found.size; ) {
    before = found.size;
    for (const [name, pattern] of rules) if (isProductive(pattern, found)) found.add(name);
  }
  return found;
}

class GrammarWriter {
  readonly #lines: string[] = [];
  readonly #productive: ReadonlySet<string>;
  #numChars = 0;
  #numRules = 0;

  constructor(root: Pattern, rules: ReadonlyMap<string, Pattern>) {
    this.#productive = productiveRules(rules);
    this.#define('root', this.#spell(root, ''));
    for (const [name, pattern] of rules) {
      if (this.#productive.has(name)) this.#define(name, this.#spell(pattern, END));
    }
    this.#define(END, ['']);
  }

  toString(): string {
    return this.#lines.join('\n');
  }

  #define(name: string, alternatives: readonly string[]): void {
    const factored = factor(alternatives, (rests) => this.#asSymbol(rests));
    const line = `${name} ::= ${factored.map((each) => each || '""').join(' | ')}`;
    this.#numChars += line.length;
    if (this.#numChars > MAX_CHARS) throw new RangeError('the grammar is too long');
    this.#lines.push(line);
  }

  /** A name, or nothing, that stands for the alternatives. */
  #asSymbol(alternatives: readonly string[]): string {
    const [only] = alternatives;
    if (alternatives.length === 1 && only !== undefined && !only.includes(' ')) return only;
    this.#numRules += 1;
    const name = `r${this.#numRules}`;
    this.#define(name, alternatives);
    return name;
  }

  /** Alternatives that spell the pattern and go on with `next`, a symbol or ''. */
  #spell(pattern: Pattern, next: string): string[] {
    switch (pattern.kind) {
      case 'set':
        return utf8Sequences(pattern.set).map((bytes) => join(spellBytes(bytes), next));
      case 'text':
        return [pattern.text === '' ? next : join(quote(pattern.text), next)];
      case 'rule':
        return this.#productive.has(pattern.name) ? [join(pattern.name, next)] : [];
      case 'choice':
        return unique(pattern.items.flatMap((item) => this.#spell(item, next)));
      case 'sequence':
        return this.#spellSequence(pattern.items, next);
      case 'repeat':
        return this.#spellRepeat(pattern, next);
    }
  }

  #spellSequence(items: readonly Pattern[], next: string): string[] {
    let following: readonly string[] = [next];
    for (const item of [...items].reverse()) {
      const [only] = following;
      if (only === undefined) return []; // what comes behind is impossible
      // One alternative behind one symbol needs no rule of its own.
      const isInline = following.length === 1 && (item.kind === 'text' || item.kind === 'rule');
      following = this.#spell(item, isInline ? only : this.#asSymbol(following));
    }
    return [...following];
  }

  #spellRepeat({ item, min, max }: Pattern & { kind: 'repeat' }, next: string): string[] {
    // Empty repetitions add nothing but ways to stand still.
    const solid = nonEmpty(item);
    const least = isNullable(item) ? 0 : min;
    if (!isProductive(solid, this.#productive)) return least === 0 ? [next] : [];
    if (least > MOST_FLAT) {
      const rest = repeat(solid, least % BLOCK, max - least + (least % BLOCK));
      return this.#spellBlocks(solid, Math.floor(least / BLOCK), rest, next);
    }
    if (max === Number.POSITIVE_INFINITY) {
      const loop = this.#loop(solid, next);
      return this.#times(solid, least, [loop]);
    }
    if (max - least > MOST_FLAT) return this.#spellLong(solid, least, max, next);
    let alternatives: readonly string[] = [next];
    for (let count = least; count < max; count += 1) {
      alternatives = unique([...this.#spell(solid, this.#asSymbol(alternatives)), next]);
    }
    return this.#times(solid, least, alternatives);
  }

  #loop(item: Pattern, next: string): string {
    this.#numRules += 1;
    const name = `r${this.#numRules}`;
    this.#define(name, [...this.#spell(item, name), next]);
    return name;
  }

  #times(item: Pattern, count: number, following: readonly string[]): string[] {
    let alternatives = [...following];
    for (let at = 0; at < count; at += 1) {
      alternatives = this.#spell(item, this.#asSymbol(alternatives));
    }
    return alternatives;
  }

  // Any count up to max - min = q * BLOCK + r: fewer than q blocks and up to BLOCK - 1 more, or q
  // blocks and up to r more.
  #spellLong(item: Pattern, min: number, max: number, next: string): string[] {
    const room = max - min;
    const numBlocks = Math.floor(room / BLOCK);
    const block = this.#asSymbol(this.#times(item, BLOCK, ['']));
    const few = this.#asSymbol(this.#spell(repeat(item, 0, BLOCK - 1), next));
    let following = this.#asSymbol(this.#spell(repeat(item, 0, room % BLOCK), next));
    for (let at = 0; at < numBlocks; at += 1) {
      following = this.#asSymbol([few, join(block, following)]);
    }
    return this.#times(item, min, [following]);
  }

  #spellBlocks(item: Pattern, count: number, rest: Pattern, next: string): string[] {
    const block = this.#asSymbol(this.#times(item, BLOCK, ['']));
    let following = this.#asSymbol(this.#spell(rest, next));
    for (let at = 0; at < count; at += 1) following = this.#asSymbol([join(block, following)]);
    return [following];
  }
}

function unique(alternatives: readonly string[]): string[] {
  return [...new Set(alternatives)];
}

function join(first: string, next: string): string {
  return next === '' ? first : `${first} ${next}`;
}

function spellBytes(sequenceOfRanges: ByteSequence): string {
  return sequenceOfRanges.map(spellByteRange).join(' ');
}

// The matcher takes a set of one byte above 7F for a character. Byte FF beside it, which UTF-8 never
// uses and whose tokens the matcher does not get, keeps the set a set.
function spellByteRange([first, last]: Range): string {
  if (first !== last) return `[${hexByte(first)}-${hexByte(last)}]`;
  return first < 0x80 ? quote(String.fromCharCode(first)) : `[${hexByte(first)}\\xff]`;
}

function hexByte(byte: number): string {
  return `\\x${byte.toString(16).padStart(2, '0')}`;
}

/** A text in the matcher's notation. */
export function quote(value: string): string {
  const escaped = value.replace(/[\\"\p{Cc}]/gu, (char) => {
    return char === '"' || char === '\\' ? `\\${char}` : hexByte(char.charCodeAt(0));
  });
  return `"${escaped}"`;
}
