// Alternatives of a rule made to begin with different byte ranges: what those that begin with the
// same one have in common is written once, what differs becomes a rule of its own. Pure functions.

/** @param define makes a rule of alternatives and gives its name. */
export function factor(
  alternatives: readonly string[],
  define: (rests: readonly string[]) => string,
): string[] {
  const groups = new Map<string, { readonly whole: string; readonly rests: Set<string> }>();
  for (const whole of new Set(alternatives)) {
    const [head, rest] = split(whole);
    const group = groups.get(head);
    if (group === undefined) groups.set(head, { whole, rests: new Set([rest]) });
    else group.rests.add(rest);
  }
  return [...groups].map(([head, { whole, rests }]) => {
    if (rests.size > 1) return `${head} ${define([...rests])}`;
    // The matcher may put a rule's own alternatives in its place, beside those that are here.
    return groups.size > 1 && isRule(head) && whole.includes(' ') ? define([whole]) : whole;
  });
}

const SYMBOL = /"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[^\s"[]+/gu;
const TEXT_HEAD = /^"(\\x[0-9a-f]{2}|\\.|[^"\\])(.*)"$/su;

function isRule(symbol: string): boolean {
  return /^[a-z]/.test(symbol);
}

/** The first byte range or rule, and what stands behind it. */
function split(alternative: string): readonly [head: string, rest: string] {
  const [first = '', ...others] = alternative.match(SYMBOL) ?? [];
  const [, char = '', tail = ''] = TEXT_HEAD.exec(first) ?? [];
  if (char === '') return [first, others.join(' ')];
  const rest = tail === '' ? others : [`"${tail}"`, ...others];
  if ((char.codePointAt(0) ?? 0) < 0x80) return [`"${char}"`, rest.join(' ')];
  const [head = '', ...bytes] = [...new TextEncoder().encode(char)].map(spellHighByte);
  return [head, [...bytes, ...rest].join(' ')];
}

/** See spellByteRange of grammar-writer.ts. */
function spellHighByte(byte: number): string {
  return `[\\x${byte.toString(16)}\\xff]`;
}
