// A synthetic byte-level BPE vocabulary of the kind that large models have: words with and without a
// space before them, capitals, code, punctuation runs, indentation, digits, and scripts of two and
// three bytes a character, whose parts are entries, too. Every merge joins two earlier entries.
// Deterministic.

/** GPT-2's printable stand-ins for the 256 bytes. */
export function byteAlphabet() {
  const printable = [];
  for (let b = 33; b <= 126; b++) printable.push(b);
  for (let b = 161; b <= 172; b++) printable.push(b);
  for (let b = 174; b <= 255; b++) printable.push(b);
  const map = new Array(256);
  for (const b of printable) map[b] = String.fromCodePoint(b);
  let next = 256;
  for (let b = 0; b < 256; b++) map[b] ??= String.fromCodePoint(next++);
  return map;
}

const ONSETS = [
  '',
  'b',
  'c',
  'd',
  'f',
  'g',
  'h',
  'l',
  'm',
  'n',
  'p',
  'r',
  's',
  't',
  'v',
  'w',
  'st',
];
const VOWELS = ['a', 'e', 'i', 'o', 'u', 'ea', 'io', 'ou'];
const CODAS = ['', '', '', 'n', 'r', 's', 't', 'd', 'l', 'm', 'ng', 'ck'];
const MARKS = [
  ...'"\'(){}[]<>:;,.=+-*/_#$&|!?@\\^~`%',
  '":',
  '",',
  '"}',
  '{"',
  '["',
  '()',
  '//',
  '=>',
];

/** What a text is drawn from, and how often. [from, to]: first and last character of a script. */
const KINDS = [
  [46, (random) => ` ${word(random)}`],
  [14, word],
  [8, (random) => ` ${capital(word(random))}`],
  [5, (random) => capital(word(random))],
  [4, (random) => ` ${word(random).toUpperCase()}`],
  [5, (random) => `${pick(random, ['_', '.', '->', '::', '-', '/'])}${word(random)}`],
  [3, (random) => pick(random, MARKS) + pick(random, MARKS) + pick(random, ['', '\n', ' '])],
  [1, (random) => pick(random, [' ', '\t', '\n', '\r\n']).repeat(1 + (random.next() % 24))],
  [14, (random) => letters(random, 0x4e00, 0x6e00, 1 + (random.next() % 3))],
  [8, (random) => letters(random, 0x0430, 0x044f, 2 + (random.next() % 5))],
  [3, (random) => letters(random, 0x00df, 0x017e, 1 + (random.next() % 3))],
  [3, (random) => letters(random, 0x0627, 0x064a, 2 + (random.next() % 4))],
  [3, (random) => letters(random, 0xac00, 0xb400, 1 + (random.next() % 2))],
  [1, (random) => letters(random, 0x1f300, 0x1f64f, 1)],
];
const TOTAL = KINDS.reduce((sum, [share]) => sum + share, 0);

/** `size` entries in the byte alphabet, the 256 bytes first, and the merges that make the others. */
export function makeVocabulary(size, random) {
  const alphabet = byteAlphabet();
  const tokens = [...alphabet];
  const seen = new Set(tokens);
  const merges = [];
  const units = new Map();
  while (tokens.length < size) {
    let joined = '';
    for (const unit of unitsOf(draw(random))) {
      // The bytes of a character come together before they join what stands before it.
      const parts = [...unit].map((_, i) => [unit.slice(0, i), unit[i]]);
      const steps = joined === '' ? parts.slice(1) : [...parts.slice(1), [joined, unit]];
      for (const [left, right] of steps) {
        const whole = left + right;
        if (seen.has(whole) || tokens.length === size) continue;
        seen.add(whole);
        merges.push([left, right]);
        tokens.push(whole);
      }
      joined += unit;
      if (!seen.has(joined)) break;
    }
  }
  return { tokens, merges };

  function unitsOf(text) {
    return Array.from(text, (char) => {
      const known = units.get(char);
      if (known !== undefined) return known;
      const unit = Array.from(Buffer.from(char), (b) => alphabet[b]).join('');
      units.set(char, unit);
      return unit;
    });
  }
}

function draw(random) {
  let place = random.next() % TOTAL;
  for (const [share, make] of KINDS) {
    if (place < share) return make(random);
    place -= share;
  }
  return '';
}

function word(random) {
  const syllable = () => pick(random, ONSETS) + pick(random, VOWELS) + pick(random, CODAS);
  return Array.from({ length: 1 + (random.next() % 4) }, syllable).join('');
}

function letters(random, from, to, count) {
  const one = () => String.fromCodePoint(from + (random.next() % (to - from + 1)));
  return Array.from({ length: count }, one).join('');
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function pick(random, list) {
  return list[random.next() % list.length];
}
