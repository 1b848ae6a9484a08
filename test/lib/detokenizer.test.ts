import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Detokenizer, TextStream } from '../../lib/detokenizer.js';
import { createTokenizer, type Tokenizer } from '../../lib/tokenizer.js';
import { byteLevelTokenizer, type Json, sentencepieceTokenizer } from './model-folder.js';

const BYTE_LEVEL = byteLevelTokenizer([
  ['å', '¥'], // e5 a5, the first two bytes of 好
  ['½', 'a'], // bd 61, the end of a character and a letter
]);

function make(json: Json): Tokenizer {
  return createTokenizer({ json, config: {}, modelVocabSize: 400, eosIds: [] });
}

const tokenizer = make(BYTE_LEVEL);
const bytes = (text: string): number[] => [...Buffer.from(text)];

function pieces(ids: readonly number[], skipSpecialTokens = true, of = tokenizer): string[] {
  const detokenizer = new Detokenizer(of, { skipSpecialTokens });
  return [...ids.map((id) => detokenizer.push(id)), detokenizer.flush()];
}

describe('the detokenizer', () => {
  test('holds the bytes of a character back until it is whole', () => {
    expect(pieces(bytes('é'))).toEqual(['', 'é', '']);
    expect(pieces(bytes('好'))).toEqual(['', '', '好', '']);
    expect(pieces(bytes('😀!'))).toEqual(['', '', '', '😀', '!', '']);
  });

  test('joins tokens that end inside a character', () => {
    expect(pieces([262, 0xbd])).toEqual(['', '好', '']);
    expect(pieces([262, 263, 0x62])).toEqual(['', '好a', 'b', '']);
  });

  test('turns bytes that cannot become a character into U+FFFD at once', () => {
    expect(pieces([0xff, 0x61])).toEqual(['\uFFFD', 'a', '']);
    expect(pieces([0xe5, 0x61])).toEqual(['', '\uFFFDa', '']);
    expect(pieces([0xed, 0xa0])).toEqual(['', '\uFFFD\uFFFD', '']); // a surrogate
    expect(pieces([0xf4, 0x90])).toEqual(['', '\uFFFD\uFFFD', '']); // above U+10FFFF
    expect(pieces([0xc0, 0x80])).toEqual(['\uFFFD', '\uFFFD', '']); // overlong
  });

  test('gives U+FFFD for what stays unfinished', () => {
    expect(pieces([0xf0, 0x9f, 0x98])).toEqual(['', '', '', '\uFFFD']);
  });

  test('leaves special tokens out, or in', () => {
    const ids = [257, ...bytes('hi'), 258];
    expect(pieces(ids).join('')).toBe('hi');
    expect(pieces(ids, false).join('')).toBe('<|im_start|>hi<|im_end|>');
  });

  test('keeps a byte order mark', () => {
    expect(pieces(bytes('\uFEFFa')).join('')).toBe('\uFEFFa');
  });

  const library = new LibraryTokenizer(BYTE_LEVEL, { clean_up_tokenization_spaces: false });
  // Mostly bytes that begin, continue or break characters.
  const anyId = fc.oneof(
    fc.integer({ min: 0, max: 263 }),
    fc.constantFrom(0xe5, 0xa5, 0xbd, 0xf0, 0x9f, 0x98, 0x80, 0xed, 0xc3, 0xa9, 262, 263, 258),
  );

  test.each([true, false])('gives what the library decodes at once (skip: %s)', (skip) => {
    fc.assert(
      fc.property(fc.array(anyId, { minLength: 1, maxLength: 60 }), (ids) => {
        const whole = library.decode(ids, { skip_special_tokens: skip });
        expect(pieces(ids, skip).join('')).toBe(whole);
      }),
      { numRuns: 1000 },
    );
  });

  test('gives well-formed text at every moment', () => {
    fc.assert(
      fc.property(fc.array(anyId, { maxLength: 60 }), (ids) => {
        for (const piece of pieces(ids)) expect(piece).not.toMatch(/\p{Surrogate}/u);
      }),
    );
  });

  test('reads sentencepiece vocabularies as the library does', () => {
    const json = sentencepieceTokenizer();
    const sentencepiece = make(json);
    const reference = new LibraryTokenizer(json, { clean_up_tokenization_spaces: false });
    const id = fc.oneof(
      fc.integer({ min: 0, max: 266 }),
      fc.constantFrom(...[0xe5, 0xa5, 0xbd, 0xc3].map((byte) => byte + 3), 259, 262, 263, 266, 1),
    );
    fc.assert(
      fc.property(fc.array(id, { minLength: 1, maxLength: 40 }), fc.boolean(), (ids, skip) => {
        const whole = reference.decode(ids, { skip_special_tokens: skip });
        expect(pieces(ids, skip, sentencepiece).join('')).toBe(whole);
      }),
      { numRuns: 1000 },
    );
  });
});

describe('a text stream', () => {
  test('ends before a stop string and tells it with the token that completed it', () => {
    const stream = new TextStream(tokenizer, { stopStrings: ['好!'] });
    const ids = bytes('a好!b');
    const found = ids.map((id) => stream.push(id));
    expect(found.map(({ text }) => text).join('')).toBe('a');
    expect(found[4]).toEqual({ text: '', stop: '好!' });
    expect(stream.flush()).toEqual({ text: '' });
  });

  test('gives what is held back at the end', () => {
    const stream = new TextStream(tokenizer, { stopStrings: ['xyz'] });
    expect([...bytes('axy'), 0xe5].map((id) => stream.push(id).text)).toEqual(['a', '', '', '']);
    expect(stream.flush()).toEqual({ text: 'xy\uFFFD' });
  });

  test('can match in the last flush', () => {
    const stream = new TextStream(tokenizer, { stopStrings: ['\uFFFD'] });
    stream.push(0xe5);
    expect(stream.flush()).toEqual({ text: '', stop: '\uFFFD' });
  });

  test('sees special tokens only when they are shown', () => {
    const run = (skipSpecialTokens: boolean) => {
      const stream = new TextStream(tokenizer, { stopStrings: ['<|im_end|>'], skipSpecialTokens });
      return [0x61, 258].map((id) => stream.push(id).stop);
    };
    expect(run(true)).toEqual([undefined, undefined]);
    expect(run(false)).toEqual([undefined, '<|im_end|>']);
  });
});
