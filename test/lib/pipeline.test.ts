import { getEventListeners } from 'node:events';
import { setImmediate as turn } from 'node:timers/promises';
import { beforeAll, describe, expect, test } from 'vitest';
import { openCheckpoint } from '../../lib/checkpoint/checkpoint.js';
import { embeddedModel } from '../../lib/embedded-model.js';
import { openPipeline } from '../../lib/open-pipeline.js';
import type { GenerationOptions, PipelineOptions } from '../../lib/options.js';
import { Pipeline } from '../../lib/pipeline.js';
import type { StreamPart } from '../../lib/response.js';
import { loadTokenizer, type Tokenizer } from '../../lib/tokenizer.js';
import { type FakeEngine, type FakeSettings, makeFakeAddon } from './support/fake-addon.js';

const EOS = 258;
const RAW = { data: new Uint8Array(12), width: 2, height: 2, channels: 3 } as const;
let tokenizer: Tokenizer;

beforeAll(async () => {
  tokenizer = await loadTokenizer(await openCheckpoint(embeddedModel()));
});

function saying(text: string): FakeSettings {
  return { answer: () => [...tokenizer.encode(text), EOS] };
}

async function open(settings: FakeSettings, options: PipelineOptions = {}) {
  const addon = makeFakeAddon(settings);
  const pipe = await openPipeline(embeddedModel(), { device: 'cpu', ...options }, addon);
  const [engine] = addon.engines;
  if (engine === undefined) throw new Error('no engine was opened');
  return { pipe, engine, addon };
}

// Steps a manual engine until `promise` settles.
async function stepUntil<T>(engine: FakeEngine, promise: Promise<T>): Promise<T> {
  let settled = false;
  const done = promise.finally(() => {
    settled = true;
  });
  done.catch(() => undefined);
  while (!settled) {
    await turn();
    engine.step();
  }
  return await done;
}

async function untilSubmitted(engine: FakeEngine, count: number): Promise<void> {
  while (engine.submitted.length < count) await turn();
}

describe('one prompt', () => {
  test('gives text without the end token, ids with it, and counts', async () => {
    const { pipe } = await open(saying('Größe ☕'));
    const response = await pipe('Hello!');
    expect(response.text).toBe('Größe ☕');
    expect(response.tokenIds).toEqual([...tokenizer.encode('Größe ☕'), EOS]);
    expect(response.finishReason).toBe('stop');
    expect(response.matchedStop).toBe(EOS);
    expect(response.generateTokenLen).toBe(response.tokenIds.length);
    expect(response.inputTokenLen).toBe((await pipe.promptIds('Hello!')).length);
    expect(response.timings).toMatchObject({ queueMs: 1, visionMs: 2, prefillMs: 3, decodeMs: 5 });
    const { preprocessMs, firstTokenMs, totalMs } = response.timings;
    expect(preprocessMs).toBeGreaterThan(0);
    expect(firstTokenMs).toBeGreaterThanOrEqual(preprocessMs);
    expect(totalMs).toBeGreaterThanOrEqual(firstTokenMs);
  });

  test('sends LMDeploy defaults to the engine', async () => {
    const { pipe, engine } = await open(saying('a'));
    await pipe('Hello!');
    expect(engine.submitted[0]).toMatchObject({
      maxNewTokens: 512,
      minNewTokens: 0,
      stopTokenIds: [...tokenizer.eosIds],
      sampling: { doSample: false, repetitionPenalty: 1, numLogprobs: 0, badWords: [] },
    });
  });

  test('null for maxNewTokens fills the session', async () => {
    const { pipe, engine } = await open({ ...saying('a'), sessionLen: 100 });
    const { inputTokenLen } = await pipe('Hello!', { maxNewTokens: null });
    expect(engine.submitted[0]?.maxNewTokens).toBe(100 - inputTokenLen);
    await pipe('Hello!', { maxNewTokens: 99 });
    expect(engine.submitted[1]?.maxNewTokens).toBe(100 - inputTokenLen);
  });

  test('a prompt that fills the session is refused with the numbers', async () => {
    const { pipe, engine } = await open({ ...saying('a'), sessionLen: 40 });
    await expect(pipe('x'.repeat(50))).rejects.toMatchObject({
      code: 'ERR_TM_PROMPT_TOO_LONG',
      message: expect.stringContaining('a session holds 40'),
    });
    expect(engine.submitted).toEqual([]);
    expect((await pipe('a')).text).toBe('a');
  });

  test('ends by length when the tokens run out', async () => {
    const { pipe } = await open(saying('abcdef'));
    const response = await pipe('Hello!', { maxNewTokens: 3 });
    expect(response).toMatchObject({ text: 'abc', finishReason: 'length', matchedStop: undefined });
  });

  test('ignoreEos leaves only the caller’s stop ids', async () => {
    const { pipe, engine } = await open(saying('abc'));
    await pipe('Hello!', { ignoreEos: true, stopTokenIds: [7, 7] });
    expect(engine.submitted[0]?.stopTokenIds).toEqual([7]);
  });

  test('bad words are banned with and without the space before them', async () => {
    const { pipe, engine } = await open(saying('abc'));
    await pipe('Hello!', { badWords: ['no'] });
    // This vocabulary has one spelling of each; what ends with `no` ends with it after a space too.
    expect(engine.submitted[0]?.sampling.badWords).toEqual([tokenizer.encode('no')]);
  });

  test('log probabilities come one a token', async () => {
    const { pipe } = await open(saying('ab'));
    const response = await pipe('Hello!', { logprobs: 2 });
    expect(response.logprobs?.map(({ tokenId }) => tokenId)).toEqual(response.tokenIds);
    expect(response.logprobs?.[0]?.topLogprobs).toHaveLength(1);
  });

  test('an engine error rejects with its code and leaves the pipeline usable', async () => {
    const { pipe, engine } = await open({ ...saying('ok'), manual: true });
    const failing = pipe('Hello!');
    await untilSubmitted(engine, 1);
    engine.fail(engine.submitted[0]?.id ?? -1, 'ERR_TM_OUT_OF_MEMORY', 'no block is free');
    await expect(failing).rejects.toMatchObject({
      name: 'TurbomindError',
      code: 'ERR_TM_OUT_OF_MEMORY',
      message: 'no block is free',
    });
    expect((await stepUntil(engine, pipe('Hello!'))).text).toBe('ok');
  });
});

describe('stop words', () => {
  test('end the text before the word, abort natively and name the word', async () => {
    const { pipe, engine } = await open({ ...saying('one two three'), manual: true });
    const response = await stepUntil(engine, pipe('Hello!', { stopWords: ['wo t', 'zzz'] }));
    expect(response).toMatchObject({ text: 'one t', finishReason: 'stop', matchedStop: 'wo t' });
    expect(response.tokenIds).toEqual(tokenizer.encode('one two t'));
    expect(engine.aborted).toEqual([engine.submitted[0]?.id]);
  });

  test('are never shown in part while streaming', async () => {
    const { pipe } = await open(saying('a STOX b STOP c'));
    let text = '';
    for await (const part of pipe.stream('Hello!', { stopWords: ['STOP'] })) {
      text += part.text;
      expect('a STOX b '.startsWith(text)).toBe(true);
    }
    expect(text).toBe('a STOX b ');
  });
});

describe('batches', () => {
  test('keep the order of prompts whatever the order of answers', async () => {
    const lengths = [9, 1, 5];
    let index = 0;
    const settings = {
      answer: () => [...tokenizer.encode('x'.repeat(lengths[index++] ?? 0)), EOS],
    };
    const { pipe } = await open(settings);
    const responses = await pipe(['a', 'b', 'c']);
    expect(responses.map(({ text }) => text.length)).toEqual(lengths);
    expect(responses.map((response) => response.index)).toEqual([0, 1, 2]);
  });

  test('one bad item is an error response and the others go on', async () => {
    const { pipe } = await open(saying('fine'));
    const image = { data: new Uint8Array(5), width: 2, height: 2, channels: 3 } as const;
    const responses = await pipe(['a', { text: 'b', images: [image] }, '', 'd']);
    expect(responses.map(({ finishReason }) => finishReason)).toEqual([
      'stop',
      'error',
      'error',
      'stop',
    ]);
    expect(responses[1]?.error).toMatchObject({ code: 'ERR_TM_INVALID_IMAGE' });
    expect(responses[2]?.error).toMatchObject({ code: 'ERR_TM_INVALID_PROMPT' });
    expect(responses[2]?.error?.message).toContain('prompt[2]');
    expect(responses[3]?.text).toBe('fine');
  });

  test('take one set of options each', async () => {
    const { pipe, engine } = await open(saying('abc'));
    const responses = await pipe(['a', 'b'], [{ maxNewTokens: 1 }, { maxNewTokens: 2 }]);
    expect(responses.map(({ text }) => text)).toEqual(['a', 'ab']);
    expect(new Set(engine.submitted.map(({ id }) => id)).size).toBe(2);
    await expect(pipe(['a', 'b'], [{}])).rejects.toMatchObject({ code: 'ERR_TM_INVALID_OPTION' });
  });

  test('a batch of one gives a list of one', async () => {
    const { pipe } = await open(saying('abc'));
    expect(await pipe(['a'])).toHaveLength(1);
    expect(await pipe([[{ role: 'user', content: 'a' }]])).toHaveLength(1);
  });
});

describe('streams', () => {
  test('parts join to the response, whose last part carries it', async () => {
    const { pipe } = await open(saying('Größe ☕!'));
    const parts: StreamPart[] = [];
    for await (const part of pipe.stream('Hello!')) parts.push(part);
    const last = parts.at(-1);
    expect(parts.map(({ text }) => text).join('')).toBe('Größe ☕!');
    expect(parts.flatMap(({ tokenIds }) => tokenIds)).toEqual(last?.response?.tokenIds);
    expect(last?.finishReason).toBe('stop');
    expect(parts.slice(0, -1).every(({ response }) => response === undefined)).toBe(true);
  });

  test('a slow reader gets few long parts, not a queue of short ones', async () => {
    const { pipe, engine } = await open({ ...saying('x'.repeat(300)), manual: true });
    const stream = pipe.stream('Hello!');
    const first = stream.next();
    await untilSubmitted(engine, 1);
    engine.step();
    expect((await first).value?.text).toBe('x');
    for (let i = 0; i < 310; i++) engine.step();
    const second = await stream.next();
    expect(second.value?.text).toBe('x'.repeat(299));
    expect(second.value?.finishReason).toBe('stop');
    expect((await stream.next()).done).toBe(true);
  });

  test('nothing starts before the first pull', async () => {
    const { pipe, engine } = await open(saying('a'));
    const stream = pipe.stream('Hello!');
    await turn();
    expect(engine.submitted).toEqual([]);
    await stream.return();
    expect((await stream.next()).done).toBe(true);
    expect(engine.submitted).toEqual([]);
  });

  test('break aborts natively at once', async () => {
    const { pipe, engine } = await open(saying('abcdefgh'.repeat(50)));
    for await (const part of pipe.stream('Hello!')) {
      expect(part.text).not.toBe('');
      break;
    }
    expect(engine.aborted).toEqual([engine.submitted[0]?.id]);
    expect(engine.running.size).toBe(0);
  });

  test('a signal ends it with its reason and removes its listener', async () => {
    const { pipe, engine } = await open({ ...saying('abc'), manual: true });
    const controller = new AbortController();
    const stream = pipe.stream('Hello!', { signal: controller.signal });
    const next = stream.next();
    await untilSubmitted(engine, 1);
    controller.abort(new Error('enough'));
    await expect(next).rejects.toThrow('enough');
    expect(engine.aborted).toHaveLength(1);
    expect(getEventListeners(controller.signal, 'abort')).toEqual([]);
    expect((await stream.next()).done).toBe(true);
  });

  test('a batch is multiplexed, errors included', async () => {
    const { pipe } = await open(saying('ab'));
    const texts = ['', '', ''];
    const reasons: (string | undefined)[] = [];
    for await (const part of pipe.stream(['a', { text: 'b', images: ['/nonexistent.png'] }, 'c'])) {
      texts[part.index] += part.text;
      if (part.finishReason) reasons[part.index] = part.finishReason;
    }
    expect(texts).toEqual(['ab', '', 'ab']);
    expect(reasons).toEqual(['stop', 'error', 'stop']);
  });

  test('the error of a single prompt is thrown', async () => {
    const { pipe } = await open(saying('ab'));
    const stream = pipe.stream({ text: 'b', images: ['/nonexistent.png'] });
    await expect(stream.next()).rejects.toMatchObject({ code: 'ERR_TM_INVALID_IMAGE' });
    expect((await stream.next()).done).toBe(true);
  });
});

describe('abort and close', () => {
  test('an aborted call rejects with the reason, frees natively, removes its listener', async () => {
    const { pipe, engine } = await open({ ...saying('abc'), manual: true });
    const controller = new AbortController();
    const call = pipe(['a', 'b'], { signal: controller.signal });
    await untilSubmitted(engine, 2);
    const reason = { why: 'tired' };
    controller.abort(reason);
    await expect(call).rejects.toBe(reason);
    expect(engine.aborted).toEqual(engine.submitted.map(({ id }) => id));
    expect(getEventListeners(controller.signal, 'abort')).toEqual([]);
  });

  test('an already aborted signal submits nothing', async () => {
    const { pipe, engine } = await open(saying('abc'));
    await expect(pipe('a', { signal: AbortSignal.abort('no') })).rejects.toBe('no');
    expect(engine.submitted).toEqual([]);
  });

  test('a finished call leaves no listener behind', async () => {
    const { pipe } = await open(saying('abc'));
    const { signal } = new AbortController();
    await pipe('a', { signal });
    expect(getEventListeners(signal, 'abort')).toEqual([]);
  });

  test('close rejects what runs, is idempotent, and later calls say so', async () => {
    const { pipe, engine } = await open({ ...saying('abc'), manual: true });
    const running = pipe('a');
    const stream = pipe.stream('b');
    const next = stream.next();
    await untilSubmitted(engine, 2);
    await Promise.all([
      expect(running).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' }),
      expect(next).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' }),
      pipe.close(),
      pipe.close(),
    ]);
    expect(engine.numCloses).toBe(1);
    await expect(pipe('a')).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
    await expect(pipe.stream('a').next()).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
    await expect(pipe(['a', 'b'])).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
    expect(() => pipe.stats()).toThrow('closed');
  });

  test('close while pictures are being read rejects the call', async () => {
    const { pipe } = await open(saying('abc'));
    const call = pipe({ text: 'a', images: [RAW] });
    const rejected = expect(call).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
    await pipe.close();
    await rejected;
  });

  test('await using closes', async () => {
    const { pipe, engine } = await open(saying('abc'));
    {
      await using scoped = pipe;
      expect((await scoped('a')).text).toBe('abc');
    }
    expect(engine.isClosed).toBe(true);
  });
});

describe('the callable', () => {
  test('is a function and a Pipeline', async () => {
    const { pipe } = await open(saying('abc'));
    expect(typeof pipe).toBe('function');
    expect(pipe).toBeInstanceOf(Pipeline);
    expect(pipe).toBeInstanceOf(Function);
    expect(await pipe('a')).toMatchObject({ text: 'abc' });
    expect(pipe.info).toMatchObject({ device: 'fake', quantization: 'awq', hasVision: true });
    expect(pipe.decode(tokenizer.encode('☕'))).toBe('☕');
  });
});

describe('opening', () => {
  test('native errors keep their code', async () => {
    const openError = Object.assign(new Error('too big'), { code: 'ERR_TM_OUT_OF_MEMORY' });
    await expect(open({ ...saying(''), openError })).rejects.toMatchObject({
      name: 'TurbomindError',
      code: 'ERR_TM_OUT_OF_MEMORY',
    });
  });

  test('passes options through and reports progress', async () => {
    const shares: number[] = [];
    const options = { threads: 3, sessionLen: 256, maxBatchSize: 4, cpuIsa: 'avx2' } as const;
    const { addon } = await open(saying('a'), { ...options, onProgress: (s) => shares.push(s) });
    expect(addon.opened[0]).toMatchObject({ ...options, blockSize: 64, maxPrefillTokenNum: 512 });
    expect(shares).toEqual([1]);
  });

  test('speculates on the CPU unless told otherwise', async () => {
    const drafts = async (options: PipelineOptions) =>
      (await open(saying('a'), options)).addon.opened[0]?.numSpeculativeTokens;
    expect(await drafts({})).toBe(7);
    expect(await drafts({ speculativeConfig: { method: 'ngram' } })).toBe(7);
    expect(await drafts({ speculativeConfig: { method: 'ngram', numSpeculativeTokens: 2 } })).toBe(
      2,
    );
    expect(await drafts({ speculativeConfig: { method: 'none' } })).toBe(0);
  });

  test('an aborted load rejects with the reason', async () => {
    const options = { signal: AbortSignal.abort('not now') };
    await expect(open(saying('a'), options)).rejects.toBe('not now');
  });

  test('a chat template replaces the model’s own', async () => {
    const chatTemplate = '{% for m in messages %}{{ m.content }}{% endfor %}';
    const { pipe } = await open(saying('a'), { chatTemplate });
    expect(pipe.decode(await pipe.promptIds('plain'))).toBe('plain');
  });

  test.each(['cpu', 'auto'] as const)('dtype needs a GPU: device %s refuses it', async (device) => {
    const nothing = { library: '', driver: false, devices: [], problems: [], reason: 'none' };
    const opening = openPipeline(
      embeddedModel(),
      { device, dtype: 'float16' },
      makeFakeAddon(saying('')),
      async () => nothing,
    );
    await expect(opening).rejects.toMatchObject({
      code: 'ERR_TM_INVALID_OPTION',
      message: expect.stringContaining("dtype: 'float16' needs a GPU"),
    });
  });

  test.each([
    ['bfloat16', 'bfloat16'],
    [undefined, 'auto'],
  ] as const)('dtype %s reaches the engine as %s', async (dtype, wanted) => {
    const addon = makeFakeAddon(saying(''));
    const found = { library: 'l', driver: true, devices: ['GPU'], problems: [''], reason: '' };
    await openPipeline(embeddedModel(), { device: 'cuda', dtype }, addon, async () => found);
    expect(addon.opened[0]?.dtype).toBe(wanted);
  });

  test('a folder that does not exist is named', async () => {
    const opening = openPipeline('/no/such/model', { device: 'cpu' }, makeFakeAddon(saying('')));
    await expect(opening).rejects.toMatchObject({ code: 'ERR_TM_MODEL_NOT_FOUND' });
  });
});

describe('tiles', () => {
  async function tilesOf(options: GenerationOptions, images = [RAW]) {
    const { pipe, addon } = await open(saying('a'), { maxDynamicPatch: 10 });
    await pipe({ text: 'a', images }, options);
    return addon.tiled.map(({ minTiles, maxTiles, useThumbnail }) => ({
      minTiles,
      maxTiles,
      useThumbnail,
    }));
  }

  test('the nearest setting wins', async () => {
    expect(await tilesOf({})).toEqual([{ minTiles: 1, maxTiles: 10, useThumbnail: true }]);
    expect(await tilesOf({ maxDynamicPatch: 3, useThumbnail: false })).toEqual([
      { minTiles: 1, maxTiles: 3, useThumbnail: false },
    ]);
  });

  test('a budget is shared out evenly and never below one', async () => {
    // Different ones: the same picture would be cut once.
    const three = [1, 2, 3].map((value) => ({ ...RAW, data: RAW.data.map(() => value) }));
    expect((await tilesOf({ maxTiles: 7 }, three)).map(({ maxTiles }) => maxTiles)).toEqual([
      2, 2, 2,
    ]);
    expect((await tilesOf({ maxTiles: 2 }, three)).map(({ maxTiles }) => maxTiles)).toEqual([
      1, 1, 1,
    ]);
    expect((await tilesOf({ maxTiles: 90 })).map(({ maxTiles }) => maxTiles)).toEqual([10]);
  });

  test('a message part’s own limit comes first', async () => {
    const { pipe, addon } = await open(saying('a'));
    const part = { type: 'image', image: RAW, maxDynamicPatch: 2 } as const;
    await pipe([{ role: 'user', content: [part, { type: 'text', text: 'a' }] }]);
    expect(addon.tiled[0]?.maxTiles).toBe(2);
  });
});
