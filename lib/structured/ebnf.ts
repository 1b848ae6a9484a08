// Grammars that callers write, made safe for the matcher: its sets of characters work on bytes, so
// a set with characters above U+007F is written out as UTF-8. Everything else stays as it is, and
// the matcher's own parser judges it. Pure functions.
import { type CharSet, charSet, charsOf, complement, type Range, union } from './char-set.js';
import { writeSet } from './grammar-writer.js';

export class EbnfError extends Error {}

const ESCAPES: ReadonlyMap<string, number> = new Map([
  ['n', 10],
  ['r', 13],
  ['t', 9],
  ['b', 8],
  ['f', 12],
  ['v', 11],
  ['a', 7],
  ['e', 27],
  ['0', 0],
]);

/** @throws EbnfError where a text or a set has no end. */
export function normalizeEbnf(source: string): string {
  let out = '';
  let at = 0;
  while (at < source.length) {
    const end = endOfPart(source, at);
    const part = source.slice(at, end);
    out += part.startsWith('[') ? rewriteSet(part, source, at) : part;
    at = end;
  }
  return out;
}

// A text, a comment, a set, or one other character.
function endOfPart(source: string, at: number): number {
  const char = source[at];
  if (char === '#') {
    const end = source.indexOf('\n', at);
    return end < 0 ? source.length : end;
  }
  if (char !== '"' && char !== '[') return at + 1;
  const closing = char === '"' ? '"' : ']';
  for (let index = at + 1; index < source.length; index += 1) {
    if (source[index] === '\\') index += 1;
    else if (source[index] === closing) return index + 1;
  }
  throw new EbnfError(`line ${lineAt(source, at)}: a ${char} without its ${closing}`);
}

function lineAt(source: string, at: number): number {
  return source.slice(0, at).split('\n').length;
}

function rewriteSet(part: string, source: string, at: number): string {
  const isNegated = part.startsWith('[^');
  const members = readMembers(part.slice(isNegated ? 2 : 1, -1), () => {
    return new EbnfError(`line ${lineAt(source, at)}: ${part} has a malformed escape or range`);
  });
  const isAscii = members.every(([, last]) => last < 0x80);
  if (isAscii) return part;
  const listed: CharSet = charSet(union(members));
  return `(${writeSet(isNegated ? complement(listed) : listed)})`;
}

function readMembers(body: string, error: () => EbnfError): Range[] {
  const chars = [...body];
  const out: Range[] = [];
  let at = 0;
  const next = (): number => {
    const { value, length } = readCharacter(chars, at, error);
    at += length;
    return value;
  };
  while (at < chars.length) {
    const first = next();
    const isRange = chars[at] === '-' && at + 1 < chars.length;
    if (isRange) at += 1;
    const last = isRange ? next() : first;
    if (last < first) throw error();
    out.push([first, last]);
  }
  return out;
}

function readCharacter(
  chars: readonly string[],
  at: number,
  error: () => EbnfError,
): { readonly value: number; readonly length: number } {
  const char = chars[at] ?? '';
  if (char !== '\\') return { value: charsOf(char)[0]?.[0] ?? 0, length: 1 };
  const name = chars[at + 1] ?? '';
  const digits = { x: 2, u: 4, U: 8 }[name];
  if (digits !== undefined) {
    const hex = chars.slice(at + 2, at + 2 + digits).join('');
    if (!/^[0-9a-fA-F]+$/.test(hex)) throw error();
    return { value: Number.parseInt(hex, 16), length: 2 + hex.length };
  }
  if (name === '') throw error();
  return { value: ESCAPES.get(name) ?? name.codePointAt(0) ?? 0, length: 2 };
}
