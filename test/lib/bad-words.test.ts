// Bad words against brute force: whatever tokens spell a word, one of its sequences ends them.
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { BadWordSpeller, MAX_SPELLINGS } from '../../lib/bad-words.js';
import { bytesOfText } from '../../lib/token-bytes.js';
import type { Tokenizer } from '../../lib/tokenizer.js';

const noPause = async (): Promise<void> => undefined;

// Greedy longest match over `pieces`; ids are places in it.
function tokenizerOf(pieces: readonly string[]): Tokenizer {
  const encode = (text: string): number[] => {
    const ids: number[] = [];
    for (let from = 0; from < text.length; ) {
      const fits = pieces.filter((piece) => piece !== '' && text.startsWith(piece, from));
      const longest = fits.reduce((best, piece) => (piece.length > best.length ? piece : best), '');
      if (longest === '') return [];
      ids.push(pieces.indexOf(longest));
      from += longest.length;
    }
    return ids;
  };
  return {
    encode,
    vocabSize: pieces.length,
    idOf: (token) => pieces.indexOf(token),
    bytesOf: (id) => bytesOfText(pieces[id] ?? ''),
    textOf: (id) => pieces[id],
    isSpecial: () => false,
    specialTokens: [],
    eosIds: [],
    stripsLeadingSpace: false,
    prepare: () => undefined,
  };
}

function allCuts(text: string, pieces: readonly string[]): number[][] {
  if (text === '') return [[]];
  return pieces.flatMap((piece, id) =>
    piece !== '' && text.startsWith(piece)
      ? allCuts(text.slice(piece.length), pieces).map((rest) => [id, ...rest])
      : [],
  );
}

function endsWith(ids: readonly number[], tail: readonly number[]): boolean {
  return (
    tail.length <= ids.length && tail.every((id, i) => ids[ids.length - tail.length + i] === id)
  );
}

describe('bad words', () => {
  test('every way to cut a word is banned, and nothing else is', async () => {
    const piece = fc.string({ unit: fc.constantFrom('a', 'b', ' '), minLength: 1, maxLength: 3 });
    const word = fc.string({ unit: fc.constantFrom('a', 'b'), minLength: 1, maxLength: 6 });
    await fc.assert(
      fc.asyncProperty(fc.array(piece, { maxLength: 12 }), fc.array(word), async (more, words) => {
        const pieces = ['a', 'b', ' ', ...more];
        const speller = new BadWordSpeller(tokenizerOf(pieces), pieces.length);
        const sequences = await speller.spell(words, noPause);
        for (const each of words) {
          for (const form of [each, ` ${each}`]) {
            const cuts = allCuts(form, pieces);
            if (cuts.length > MAX_SPELLINGS) continue;
            for (const ids of cuts)
              expect(sequences.some((tail) => endsWith(ids, tail))).toBe(true);
          }
        }
        for (const ids of sequences) {
          const text = ids.map((id) => pieces[id]).join('');
          expect(words).toContain(text.trimStart());
        }
      }),
    );
  });

  test('of a word with very many spellings the shortest are banned', async () => {
    const pieces = ['x', 'xx', 'xxx', 'xxxx', ' '];
    const speller = new BadWordSpeller(tokenizerOf(pieces), pieces.length);
    const sequences = await speller.spell(['x'.repeat(40)], noPause);
    expect(sequences.length).toBeLessThanOrEqual(2 * MAX_SPELLINGS + 2);
    expect(sequences).toContainEqual(Array.from({ length: 10 }, () => 3));
    expect(Math.max(...sequences.map((ids) => ids.length))).toBeLessThan(14);
  });

  test('characters of several bytes are spelled by their bytes', async () => {
    const tokens = [0xe2, 0x82, 0xac].map((byte) => Uint8Array.of(byte));
    const tokenizer = {
      ...tokenizerOf(['', '', '', '€']),
      bytesOf: (id: number) => tokens[id] ?? bytesOfText('€'),
    };
    const sequences = await new BadWordSpeller(tokenizer, 4).spell(['€'], noPause);
    expect(sequences).toContainEqual([3]);
    expect(sequences).toContainEqual([0, 1, 2]);
  });

  test('pauses while the table of a large vocabulary is built, once', async () => {
    const pieces = Array.from({ length: 20_000 }, (_, id) => `t${id}`);
    const speller = new BadWordSpeller(tokenizerOf(pieces), pieces.length);
    let pauses = 0;
    const pause = async (): Promise<void> => {
      pauses += 1;
    };
    expect(await speller.spell(['t17'], pause)).toEqual([[17]]);
    expect(pauses).toBe(4);
    await speller.spell(['t18'], pause);
    expect(pauses).toBe(4);
  });
});
