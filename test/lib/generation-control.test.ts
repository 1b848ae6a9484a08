// n choices, logits processors, outputs, perplexity and embeddings over a fake engine: what crosses
// to native, what comes back, and that failures stay with their own request.
import { setImmediate as turn } from 'node:timers/promises';
import { beforeAll, describe, expect, test, vi } from 'vitest';
import { openCheckpoint } from '../../lib/checkpoint/checkpoint.js';
import { embeddedModel } from '../../lib/embedded-model.js';
import type { NativeRequest } from '../../lib/native-types.js';
import { openPipeline } from '../../lib/open-pipeline.js';
import { loadTokenizer, type Tokenizer } from '../../lib/tokenizer.js';
import { FAKE_HIDDEN, FAKE_VOCAB, type FakeSettings, makeFakeAddon } from './support/fake-addon.js';

const EOS = 258;
let tokenizer: Tokenizer;

beforeAll(async () => {
  tokenizer = await loadTokenizer(await openCheckpoint(embeddedModel()));
});

async function open(settings: FakeSettings) {
  const addon = makeFakeAddon(settings);
  const pipe = await openPipeline(embeddedModel(), { device: 'cpu' }, addon);
  const [engine] = addon.engines;
  if (engine === undefined) throw new Error('no engine was opened');
  return { pipe, engine };
}

function saying(text: string): FakeSettings {
  return { answer: () => [...tokenizer.encode(text), EOS] };
}

// Each answers with the letter of its seed.
const lettered: FakeSettings = {
  answer: ({ sampling }: NativeRequest) => [
    ...tokenizer.encode(String.fromCharCode(97 + Number(sampling.seed % 26n))),
    EOS,
  ],
};

describe('n', () => {
  test('is so many requests with seeds one after the other', async () => {
    const { pipe, engine } = await open(lettered);
    const response = await pipe('Hello!', { n: 3, doSample: true, randomSeed: 1 });
    expect(engine.submitted.map(({ sampling }) => sampling.seed)).toEqual([1n, 2n, 3n]);
    expect(response.text).toBe('b');
    expect(response.choices?.map(({ text, choice }) => [text, choice])).toEqual([
      ['b', 0],
      ['c', 1],
      ['d', 2],
    ]);
    const seed = 2n ** 64n - 1n;
    await pipe('Hello!', { n: 2, doSample: true, randomSeed: seed });
    expect(engine.submitted.slice(3).map(({ sampling }) => sampling.seed)).toEqual([seed, 0n]);
  });

  test('works in batches, each prompt with its own', async () => {
    const { pipe } = await open(lettered);
    const options = [
      { n: 2, doSample: true, randomSeed: 0 },
      { doSample: true, randomSeed: 5 },
    ];
    const [first, second] = await pipe(['one', 'two'], options);
    expect(first?.choices?.map(({ text }) => text)).toEqual(['a', 'b']);
    expect(first?.choices?.map(({ index }) => index)).toEqual([0, 0]);
    expect(second).toMatchObject({ text: 'f', choices: undefined, index: 1, choice: 0 });
  });

  test('works in streams: parts say their choice, each choice ends', async () => {
    const { pipe } = await open(lettered);
    const texts = ['', '', ''];
    let ends = 0;
    for await (const part of pipe.stream('Hi', { n: 3, doSample: true, randomSeed: 0 })) {
      texts[part.choice] += part.text;
      if (part.response !== undefined) ends += 1;
    }
    expect(texts).toEqual(['a', 'b', 'c']);
    expect(ends).toBe(3);
  });

  test('a failing choice fails the prompt; abort ends all of them', async () => {
    const { pipe, engine } = await open({ ...lettered, manual: true });
    const failing = pipe('Hi', { n: 3, doSample: true });
    failing.catch(() => undefined);
    while (engine.submitted.length < 3) await turn();
    engine.fail(2, 'ERR_TM_OUT_OF_MEMORY', 'scripted');
    engine.step();
    engine.step();
    await expect(failing).rejects.toMatchObject({ code: 'ERR_TM_OUT_OF_MEMORY' });

    const controller = new AbortController();
    const aborted = pipe('Hi', { n: 2, doSample: true, signal: controller.signal });
    aborted.catch(() => undefined);
    while (engine.submitted.length < 5) await turn();
    controller.abort(new Error('enough'));
    await expect(aborted).rejects.toThrow('enough');
    expect(engine.running.size).toBe(0);
  });

  test('greedy answers are refused, for they would be equal', async () => {
    const { pipe } = await open(lettered);
    await expect(pipe('Hi', { n: 2 })).rejects.toMatchObject({ code: 'ERR_TM_INVALID_OPTION' });
  });
});

describe('logitsProcessor', () => {
  test('gets prompt and completion, and decides', async () => {
    const { pipe, engine } = await open(saying('abc'));
    const seen: number[][] = [];
    const [x = 0] = tokenizer.encode('x');
    const response = await pipe('Hello!', {
      logitsProcessor: (ids, logits) => {
        seen.push([...ids]);
        expect(logits).toHaveLength(FAKE_VOCAB);
        if (seen.length === 2) logits[x] = 7;
      },
    });
    expect(response.text).toBe('axc');
    const prompt = [...(engine.submitted[0]?.promptTokens ?? [])];
    expect(seen).toEqual(
      response.tokenIds.map((_, i) => [...prompt, ...response.tokenIds.slice(0, i)]),
    );
    expect(engine.edited.map(({ completionIdx }) => completionIdx)).toEqual([0, 1, 2, 3]);
  });

  test('several run one after the other; returned logits replace', async () => {
    const { pipe } = await open(saying('a'));
    const [y = 0] = tokenizer.encode('y');
    const { tokenIds } = await pipe('Hello!', {
      maxNewTokens: 1,
      logitsProcessor: [
        (_, logits) => new Float32Array(logits.length),
        (_, logits) => {
          expect(Math.max(...logits)).toBe(0);
          logits[y] = 1;
        },
      ],
    });
    expect(tokenIds).toEqual([y]);
  });

  test.each([
    [
      'an exception',
      () => {
        throw new Error('my fault');
      },
      'my fault',
    ],
    ['a wrong length', () => new Float32Array(3), 'returned 3 logits'],
    ['a promise', (async () => undefined) as never, 'returned a promise'],
  ])('%s ends its own request only', async (_, logitsProcessor, message) => {
    const { pipe, engine } = await open(saying('ab'));
    const [bad, good] = await pipe(['x', 'y'], [{ logitsProcessor }, {}]);
    expect(bad?.error).toMatchObject({
      code: 'ERR_TM_LOGITS_PROCESSOR',
      message: expect.stringContaining(message),
    });
    expect(good?.text).toBe('ab');
    expect(engine.running.size).toBe(0);
  });

  test('no further logits are edited behind a stop word', async () => {
    const { pipe } = await open(saying('abcdef'));
    let calls = 0;
    const { text } = await pipe('Hello!', {
      stopWords: ['c'],
      logitsProcessor: () => {
        calls += 1;
      },
    });
    expect(text).toBe('ab');
    expect(calls).toBe(3);
  });
});

describe('outputs', () => {
  test('generation has a row a token, all those of the prompt before', async () => {
    const { pipe } = await open(saying('ab'));
    const one = await pipe('Hello!', { outputLogits: 'generation', outputLastHiddenState: 'all' });
    expect(one.logits?.shape).toEqual([3, FAKE_VOCAB]);
    for (const [row, id] of one.tokenIds.entries()) {
      expect(one.logits?.data[row * FAKE_VOCAB + id]).toBe(1);
    }
    expect(one.lastHiddenState?.shape).toEqual([one.inputTokenLen - 1 + 3, FAKE_HIDDEN]);
    const none = await pipe('Hello!');
    expect([none.logits, none.lastHiddenState]).toEqual([undefined, undefined]);
  });

  test('nothing unknown is taken for a range', async () => {
    const { pipe } = await open(saying('ab'));
    const outputLogits = 'everything' as 'all';
    await expect(pipe('Hello!', { outputLogits })).rejects.toThrow('outputLogits');
  });
});

describe('getPpl', () => {
  test('one prompt gives a number, a list a list, in order', async () => {
    const { pipe, engine } = await open(saying('a'));
    expect(await pipe.getPpl('Hello')).toBe(0.5);
    expect(await pipe.getPpl([[1, 2, 3], Int32Array.of(4, 5), 'Hi'])).toEqual([0.5, 0.5, 0.5]);
    expect(await pipe.getPpl([1, 2, 3])).toBe(0.5);
    expect(await pipe.getPpl([])).toEqual([]);
    expect(engine.submitted[1]).toMatchObject({
      maxNewTokens: 0,
      promptTokens: Int32Array.of(1, 2, 3),
      outputs: { logits: 'none', hiddenStates: 'none', pooling: 'none', promptNll: true },
    });
  });

  test.each([
    ['', '0 token(s)'],
    [[7], '1 token(s)'],
    [[1, 384], '384 is not a token id'],
    [[1, 0.5], '0.5 is not a token id'],
  ])('%o is refused', async (prompt, message) => {
    const { pipe } = await open(saying('a'));
    await expect(pipe.getPpl(prompt)).rejects.toMatchObject({
      code: 'ERR_TM_INVALID_PROMPT',
      message: expect.stringContaining(message),
    });
  });

  test('a failure, and a signal, end all that runs', async () => {
    const { pipe, engine } = await open({ ...saying('a'), manual: true });
    const failing = pipe.getPpl(['one', 'two', 'three']);
    failing.catch(() => undefined);
    while (engine.submitted.length < 3) await turn();
    engine.fail(2, 'ERR_TM_PROMPT_TOO_LONG', 'scripted');
    await expect(failing).rejects.toMatchObject({ code: 'ERR_TM_PROMPT_TOO_LONG' });
    expect(engine.running.size).toBe(0);

    const controller = new AbortController();
    const aborted = pipe.getPpl(['one', 'two'], { signal: controller.signal });
    aborted.catch(() => undefined);
    while (engine.submitted.length < 5) await turn();
    controller.abort(new Error('enough'));
    await expect(aborted).rejects.toThrow('enough');
    expect(engine.running.size).toBe(0);

    const closed = pipe.getPpl('one');
    closed.catch(() => undefined);
    while (engine.submitted.length < 6) await turn();
    await pipe.close();
    await expect(closed).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
    await expect(pipe.getPpl('one')).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
  });
});

describe('embed', () => {
  test('vectors have length 1 unless told otherwise', async () => {
    const { pipe, engine } = await open(saying('a'));
    const [first, second] = await pipe.embed(['one', 'three']);
    for (const vector of [first, second]) expect(Math.hypot(...(vector ?? []))).toBeCloseTo(1, 6);
    const plain = await pipe.embed([5, 6], { normalize: false, pooling: 'mean' });
    expect([...plain]).toEqual([2, 0, -2]);
    expect(engine.submitted.map(({ outputs }) => outputs?.pooling)).toEqual([
      'last',
      'last',
      'mean',
    ]);
  });

  test('unknown options are named', async () => {
    const { pipe } = await open(saying('a'));
    const options = { pooling: 'max' } as object;
    await expect(pipe.embed('a', options)).rejects.toThrow('pooling');
    await expect(pipe.embed('a', { normalise: true } as object)).rejects.toThrow('normalize');
  });

  test('of many texts leaves the event loop its turns, and can be given up meanwhile', async () => {
    const { pipe, engine } = await open(saying('a'));
    const spend = (ms: number): void => {
      for (const end = performance.now() + ms; performance.now() < end; );
    };
    const encode = vi.spyOn(pipe.tokenizer, 'encode').mockImplementation(() => {
      spend(5);
      return [1, 2];
    });
    const controller = new AbortController();
    const embedding = pipe.embed(new Array(200).fill('a'), { signal: controller.signal });
    await turn();
    expect(encode.mock.calls.length).toBeLessThan(10);
    controller.abort(new Error('enough'));
    await expect(embedding).rejects.toThrow('enough');
    expect(encode.mock.calls.length).toBeLessThan(20);
    expect(engine.submitted).toEqual([]);
  });

  test('thousands are not all sent at once', async () => {
    const { pipe, engine } = await open({ ...saying('a'), manual: true });
    const many = pipe.embed(Array.from({ length: 1000 }, (_, i) => [i % 300]));
    while (engine.submitted.length < 256) await turn();
    await turn();
    expect(engine.running.size).toBe(256);
    while (engine.submitted.length < 1000) {
      engine.step();
      await turn();
    }
    engine.step();
    expect(await many).toHaveLength(1000);
  });
});
