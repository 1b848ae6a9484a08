import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { openCheckpoint } from '../../lib/checkpoint/checkpoint.js';
import { createTokenizer, loadTokenizer, type Tokenizer } from '../../lib/tokenizer.js';
import {
  byteLevelTokenizer,
  chatConfig,
  chatVisionTensors,
  decoderTensors,
  expectError,
  type Json,
  SPECIAL_TOKENS,
  sentencepieceTokenizer,
  textConfig,
  writeModelFolder,
} from './model-folder.js';

const MERGES = [
  ['h', 'e'],
  ['l', 'l'],
  ['he', 'll'],
  ['Ġ', 'w'],
  ['i', 'm'],
  ['im', 'g'],
] as const;

function make(json: Json, config: Json = {}, fields: Json = {}): Tokenizer {
  return createTokenizer({ json, config, modelVocabSize: 320, eosIds: [], ...fields });
}

describe('a byte-level tokenizer', () => {
  const json = byteLevelTokenizer(MERGES);
  const tokenizer = make(json);

  test('encodes merges and special tokens', () => {
    expect(tokenizer.encode('hello w<|im_end|>')).toEqual([264, 111, 265, 258]);
    expect(tokenizer.encode('')).toEqual([]);
  });

  test('knows the bytes of every token', () => {
    for (let byte = 0; byte < 256; byte += 1) {
      expect([...tokenizer.bytesOf(byte)]).toEqual([byte]);
    }
    const text = (id: number) => Buffer.from(tokenizer.bytesOf(id)).toString();
    expect([264, 265, 261, 9999].map(text)).toEqual(['hell', ' w', '<IMG_CONTEXT>', '']);
    expect([264, 0xe5, 261].map((id) => tokenizer.textOf(id))).toEqual([
      'hell',
      undefined,
      '<IMG_CONTEXT>',
    ]);
    expect(tokenizer.textOf(0xe5)).toBeUndefined(); // from the cache
  });

  test('finds ids before and after the library is built', () => {
    const fresh = make(json);
    const ids = () =>
      ['hell', '<img>', 'none', '__proto__', 'constructor'].map((t) => fresh.idOf(t));
    const before = ids();
    fresh.prepare();
    expect(before).toEqual([264, 259, undefined, undefined, undefined]);
    expect(ids()).toEqual(before);
    expect(fresh.vocabSize).toBe(268);
  });

  test('tells special tokens from others', () => {
    expect(tokenizer.specialTokens).toEqual(SPECIAL_TOKENS);
    expect([255, 256, 261, 262].map((id) => tokenizer.isSpecial(id))).toEqual([
      false,
      true,
      true,
      false,
    ]);
  });

  test('collects end tokens from all who name them, once', () => {
    const config = { eos_token: { content: '<|im_end|>' } };
    const fields = { eosIds: [256, 258], stopTokens: ['<|endoftext|>', '<img>', '<none>'] };
    expect(make(json, config, fields).eosIds).toEqual([256, 258, 259]);
  });

  test('leaves marked tokens plain, and only those', () => {
    const mark = '\uFDD0';
    const ids = tokenizer.encode(`<img><${mark}img>he${mark}ll`, { literalMark: mark });
    const plain = [...Buffer.from('<')].concat(267, ...Buffer.from('>'));
    expect(ids).toEqual([259, ...plain, 264]);
  });

  test('gives the same ids with a mark that breaks no token', () => {
    const mark = '\uFDD0';
    const piece = fc.oneof(
      fc.constantFrom(...SPECIAL_TOKENS, ' w', 'hello', 'e\u0301', '\n\n'),
      fc.string(),
    );
    fc.assert(
      fc.property(fc.array(piece), (pieces) => {
        const text = pieces.join('');
        const marked = tokenizer.encode(text + mark, { literalMark: mark });
        expect(marked).toEqual(tokenizer.encode(text));
      }),
    );
  });

  test('never yields a special token from a text whose tokens are all marked', () => {
    const mark = '\uFDD0';
    fc.assert(
      fc.property(fc.array(fc.constantFrom(...SPECIAL_TOKENS, 'a', ' ', '<')), (pieces) => {
        const text = pieces.map((piece) => piece.slice(0, 1) + mark + piece.slice(1)).join('');
        const ids = tokenizer.encode(text, { literalMark: mark });
        expect(ids.filter((id) => tokenizer.isSpecial(id))).toEqual([]);
        expect(ids.map((id) => tokenizer.textOf(id)).join('')).toBe(pieces.join(''));
      }),
    );
  });

  test('refuses texts beyond its limit', async () => {
    const small = make(json, {}, { maxInputChars: 4 });
    expect(small.encode('abcd')).toHaveLength(4);
    await expectError(
      () => small.encode('abcde'),
      'ERR_TM_INVALID_PROMPT',
      /has 5 characters; the limit is 4/,
    );
  });

  test('adds a BOS token only when asked to, marked or not', () => {
    const post_processor = {
      type: 'TemplateProcessing',
      single: [
        { SpecialToken: { id: '<|endoftext|>', type_id: 0 } },
        { Sequence: { id: 'A', type_id: 0 } },
      ],
      pair: [],
      special_tokens: {},
    };
    const withBos = make({ ...json, post_processor });
    expect(withBos.encode('a')).toEqual([97]);
    expect(withBos.encode('a', { addSpecialTokens: true })).toEqual([256, 97]);
    expect(withBos.encode('a|', { addSpecialTokens: true, literalMark: '|' })).toEqual([256, 97]);
  });

  test('trims beside tokens that strip, as the library does', () => {
    const stripping: Json = structuredClone(json);
    stripping.added_tokens = [
      { id: 256, content: '<l>', lstrip: true, special: true },
      { id: 257, content: '<r>', rstrip: true, special: true },
    ];
    const strips = make(stripping);
    const text = 'a  <l>  b  <r>  c';
    expect(strips.encode(`${text}|`, { literalMark: '|' })).toEqual(strips.encode(text));
    expect(strips.encode(text)).toHaveLength(2 + 'a  b  c'.length);
  });
});

describe('a sentencepiece tokenizer', () => {
  const tokenizer = make(sentencepieceTokenizer());

  test('knows the bytes of its tokens', () => {
    expect([...tokenizer.bytesOf(3 + 0xe5)]).toEqual([0xe5]);
    expect(tokenizer.textOf(3 + 0x41)).toBe('A');
    expect(tokenizer.idOf('▁ab')).toBe(263);
    expect(tokenizer.textOf(263)).toBe(' ab');
    expect(tokenizer.stripsLeadingSpace).toBe(true);
  });

  test('encodes with byte fallback', () => {
    const ids = tokenizer.encode('ab☺');
    expect(ids).toEqual([263, ...[...Buffer.from('☺')].map((byte) => byte + 3)]);
  });
});

describe('a tokenizer.json', () => {
  const json = byteLevelTokenizer();
  const { model, ...withoutModel } = json;
  const token = (fields: object) => ({
    ...json,
    added_tokens: [{ id: 256, content: 'x', ...fields }],
  });

  test.each<[string, Json, RegExp]>([
    ['no model', withoutModel, /has no "model" object/],
    ['tokens that are no list', { ...json, added_tokens: {} }, /added_tokens that are not a list/],
    ['a token without an id', token({ id: null }), /malformed added token/],
    ['a token that is null', { ...json, added_tokens: [null] }, /malformed added token null/],
    ['an empty token', token({ content: '' }), /malformed added token/],
    ['a negative id', token({ id: -1 }), /malformed added token/],
    [
      'a WordPiece decoder',
      { ...json, decoder: { type: 'WordPiece' } },
      /decoder \["WordPiece"\]; supported/,
    ],
    ['no decoder', { ...json, decoder: null }, /decoder \[\]; supported/],
  ])('with %s is refused', async (_, bad, message) => {
    await expectError(() => make(bad), 'ERR_TM_INVALID_TOKENIZER', message);
  });

  test.each<[string, Json, RegExp]>([
    [
      'an unknown model',
      { ...json, model: { type: 'Magic' } },
      /cannot be used: Unknown TokenizerModel/,
    ],
    [
      'a broken expression',
      { ...json, pre_tokenizer: { type: 'Split', pattern: { Regex: '(' }, invert: false } },
      /cannot be used/,
    ],
    [
      'a vocabulary of nulls',
      { ...json, model: { type: 'BPE', vocab: null, merges: [] } },
      /cannot be used/,
    ],
  ])('with %s is refused on first use', async (_, bad, message) => {
    const tokenizer = make(bad);
    await expectError(() => tokenizer.prepare(), 'ERR_TM_INVALID_TOKENIZER', message);
  });

  test('with more ids than the model has works until a text needs one', async () => {
    const tokenizer = make(
      json,
      { eos_token: '<|im_end|>' },
      { modelVocabSize: 257, eosIds: [256, 400] },
    );
    expect(tokenizer.encode('a<|endoftext|>')).toEqual([97, 256]);
    expect(tokenizer.eosIds).toEqual([256]);
    const code = 'ERR_TM_INVALID_TOKENIZER';
    await expectError(() => tokenizer.encode('a<img>'), code, /"<img>" the id 259, .* ends at 257/);
    const marked = () => tokenizer.encode('a<img>|', { literalMark: '|' });
    await expectError(marked, code, /"<img>" the id 259/);
  });
});

describe('a model folder', () => {
  test('without a tokenizer.json, or with a broken one, is refused', async () => {
    const folder = await writeModelFolder(textConfig(), decoderTensors());
    const checkpoint = await openCheckpoint(folder);
    const code = 'ERR_TM_INVALID_TOKENIZER';
    await expectError(() => loadTokenizer(checkpoint), code, /tokenizer.json is missing/);
    await writeFile(join(folder, 'tokenizer.json'), '{"model":');
    await expectError(() => loadTokenizer(checkpoint), code, /tokenizer.json is not valid JSON/);
  });

  test('whose files disagree on the image token is refused', async () => {
    const tensors = [
      ...decoderTensors({ prefix: 'language_model.model.', head: 'language_model.lm_head' }),
      ...chatVisionTensors(),
    ];
    const checkpointWith = async (files: Json) => {
      const tokenizer = { 'tokenizer.json': byteLevelTokenizer() };
      const folder = await writeModelFolder(chatConfig(), tensors, {
        ...tokenizer,
        'added_tokens.json': files,
      });
      return openCheckpoint(folder);
    };
    const code = 'ERR_TM_INVALID_TOKENIZER';
    const wrong = await checkpointWith({ '<IMG_CONTEXT>': 260 });
    await expectError(() => loadTokenizer(wrong), code, /<IMG_CONTEXT> to 261, .* to 260/);
    const right = await checkpointWith({ '<IMG_CONTEXT>': 261 });
    const tokenizer = await loadTokenizer(right);
    // 32 characters a position of the model.
    expect(tokenizer.encode(' '.repeat(32 * 512))).toHaveLength(32 * 512);
    const encode = () => tokenizer.encode(' '.repeat(32 * 512 + 1));
    await expectError(encode, 'ERR_TM_INVALID_PROMPT', /16385 characters; the limit is 16384/);
    // config's eos, and the stop token of the format that the config names.
    expect(tokenizer.eosIds).toEqual([258]);
  });
});

describe('the tokenizer of tiny-internvl', () => {
  test('agrees with the library on any text', async () => {
    const folder = fileURLToPath(new URL('../fixtures/tiny-internvl', import.meta.url));
    const read = async (name: string): Promise<Json> =>
      JSON.parse(await readFile(join(folder, name), 'utf8'));
    const json = await read('tokenizer.json');
    const config = await read('tokenizer_config.json');
    const library = new LibraryTokenizer(json, config);
    const tokenizer = make(json, config, { modelVocabSize: 384 });
    const piece = fc.oneof(
      fc.string({ unit: 'binary' }),
      fc.constantFrom('<|im_end|>', '<img>', '\n'),
    );
    fc.assert(
      fc.property(fc.array(piece), (pieces) => {
        const text = pieces.join('');
        expect(tokenizer.encode(text)).toEqual(
          library.encode(text, { add_special_tokens: false }).ids,
        );
      }),
      { numRuns: 30 },
    );
  });
});
