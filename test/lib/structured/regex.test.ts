import { describe, expect, test } from 'vitest';
import { asJsonString } from '../../../lib/structured/pattern.js';
import { parseRegex } from '../../../lib/structured/regex.js';
import { allows, makeRandom, sample } from './patterns.js';

const SOURCES = [
  '^\\d{3}-[a-z]+$',
  '(a|b)*c',
  '[^"\\]]+x?',
  'a{2,3}?b{2}c{1,}',
  '(?<name>x)(?:y)\\.\\/',
  '\\u{1F600}\\xe9\\u0041\\ud83d\\ude00',
  'a|',
  '(a*)*b',
  '(a?b?)*',
  '((a|)b?){2,4}',
  '[\\w.-]+@[\\w-]+\\.\\w{2,}',
  '.\\s\\S\\D\\W',
  '[^\\d\\s]+|[а-я]{2}',
  '^(yes|no)$|^maybe$',
];

describe('regular expressions', () => {
  test.each(SOURCES)('%s: drawn texts match in JavaScript, too', (source) => {
    const pattern = parseRegex(source);
    const real = new RegExp(`^(?:${source})$`, 'u');
    const random = makeRandom(source.length);
    for (let round = 0; round < 200; round += 1) {
      const text = sample(pattern, random);
      expect(real.test(text), JSON.stringify(text)).toBe(true);
      expect(allows(pattern, text)).toBe(true);
      // Short, for JavaScript tries 2^n ways to match n times a with (a*)*b.
      const chars = [...text].slice(0, random(Math.min(text.length, 12) + 1));
      const changed = chars.join('') + ([...'ab"1é 😀x-'][random(9)] ?? '');
      expect(allows(pattern, changed), JSON.stringify(changed)).toBe(real.test(changed));
    }
  });

  test('inside JSON they are escaped, and read back as they were', () => {
    const pattern = parseRegex('[^a-y]{1,8}');
    const random = makeRandom(3);
    for (let round = 0; round < 200; round += 1) {
      const text = sample(asJsonString(pattern), random);
      const value: unknown = JSON.parse(`"${text}"`);
      expect(value).toMatch(/^[^a-y]{1,8}$/u);
    }
  });

  test.each([
    ['[', 'a [ without its ]'],
    ['(', 'a ( without its )'],
    ['a)', 'a ) without its ('],
    ['(?=x)', 'look-around'],
    ['(?<!x)y', 'look-around'],
    ['(?i:x)', 'modifiers'],
    ['(a)\\1', '\\1 is not supported'],
    ['\\bx', '\\b is not supported'],
    ['\\p{L}', '\\p is not supported'],
    ['*a', '* with nothing to repeat'],
    ['a**', 'a repetition of a repetition'],
    ['a{3,2}', '{3,2} goes from more to fewer'],
    ['a{20000}', 'above the limit of 10000'],
    ['x{', '{ must be written'],
    ['a^b', '^ inside the expression'],
    ['(a$)b', '$ inside the expression'],
    ['[b-a]', 'a range goes from more to less'],
    ['[\\d-x]', 'a range needs two characters'],
    ['\\ud800', 'is not a character'],
    ['\\', 'is not supported'],
  ])('%s is refused: %s', (source, problem) => {
    expect(() => parseRegex(source)).toThrow(problem);
  });
});
