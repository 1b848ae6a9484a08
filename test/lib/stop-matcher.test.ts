import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { StopMatcher } from '../../lib/stop-matcher.js';
import { expectError } from './model-folder.js';

/** The definition: the first end of a match, the longest stop string there. */
function searchNaively(stops: readonly string[], text: string): { text: string; stop?: string } {
  for (let end = 1; end <= text.length; end += 1) {
    const [stop] = stops
      .filter((candidate) => text.slice(0, end).endsWith(candidate))
      .sort((a, b) => b.length - a.length);
    if (stop !== undefined) return { text: text.slice(0, end - stop.length), stop };
  }
  return { text };
}

function runMatcher(stops: readonly string[], chunks: readonly string[]) {
  const matcher = new StopMatcher(stops);
  const found = chunks.map((chunk) => matcher.push(chunk));
  const text = found.map((piece) => piece.text).join('') + matcher.flush();
  const stop = found.find((piece) => piece.stop !== undefined)?.stop;
  return stop === undefined ? { text } : { text, stop };
}

describe('the stop matcher', () => {
  test('holds back exactly what may begin a stop string', () => {
    const matcher = new StopMatcher(['END']);
    expect(matcher.push('the E')).toEqual({ text: 'the ' });
    expect(matcher.push('N')).toEqual({ text: '' });
    expect(matcher.push('E')).toEqual({ text: 'EN' });
    expect(matcher.push('ND.')).toEqual({ text: '', stop: 'END' });
    expect(matcher.push('more')).toEqual({ text: '' });
    expect(matcher.flush()).toBe('');
  });

  test('gives held text at the end', () => {
    const matcher = new StopMatcher(['\n\nQ:']);
    expect(matcher.push('a\n\nQ')).toEqual({ text: 'a' });
    expect(matcher.flush()).toBe('\n\nQ');
  });

  test('prefers the longest stop string that ends at the same place', () => {
    expect(runMatcher(['b', 'ab'], ['xab'])).toEqual({ text: 'x', stop: 'ab' });
    expect(runMatcher(['abc', 'b'], ['abc'])).toEqual({ text: 'a', stop: 'b' });
  });

  test('finds a stop string inside the failed beginning of another', () => {
    expect(runMatcher(['aab', 'ac'], ['aa', 'c'])).toEqual({ text: 'a', stop: 'ac' });
    expect(runMatcher(['abcd', 'bce'], ['abc', 'e'])).toEqual({ text: 'a', stop: 'bce' });
    expect(runMatcher(['abcd', 'bc'], ['abc'])).toEqual({ text: 'a', stop: 'bc' });
  });

  test('without stop strings lets everything through', () => {
    expect(new StopMatcher([]).push('abc')).toEqual({ text: 'abc' });
  });

  test('refuses an empty stop string', async () => {
    await expectError(
      () => new StopMatcher(['a', '']),
      'ERR_TM_INVALID_OPTION',
      /stop string is empty/,
    );
  });

  test('agrees with the definition, however the text is cut', () => {
    const word = fc.string({ unit: fc.constantFrom('a', 'b', 'c'), minLength: 1, maxLength: 5 });
    const chunk = fc.string({ unit: fc.constantFrom('a', 'b', 'c'), maxLength: 6 });
    fc.assert(
      fc.property(
        fc.array(word, { maxLength: 5 }),
        fc.array(chunk, { maxLength: 8 }),
        (stops, chunks) => {
          expect(runMatcher(stops, chunks)).toEqual(searchNaively(stops, chunks.join('')));
        },
      ),
      { numRuns: 2000 },
    );
  });

  test('never shows text that a later stop string takes back', () => {
    const text = fc.string({ unit: fc.constantFrom('a', 'b'), maxLength: 30 });
    fc.assert(
      fc.property(
        fc.array(
          text.filter((stop) => stop !== ''),
          { minLength: 1 },
        ),
        text,
        (stops, all) => {
          const matcher = new StopMatcher(stops);
          let shown = '';
          for (const char of all) {
            shown += matcher.push(char).text;
            expect(searchNaively(stops, all).text.startsWith(shown)).toBe(true);
          }
        },
      ),
    );
  });

  test('takes a stop string of any length', () => {
    const stop = `${'ab'.repeat(20_000)}c`;
    const chunks = ['ab'.repeat(10_000), 'ab'.repeat(15_000), 'c', 'd'];
    expect(runMatcher([stop], chunks)).toEqual({ text: 'ab'.repeat(5_000), stop });
  });
});
