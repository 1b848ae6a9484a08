// A pool too small for what runs: preempted requests go on from host memory, or are computed again, with
// the tokens they get alone; limits on memory are refused with the numbers and never passed.
import { describe, expect, test } from 'vitest';
import { estimate, type PipelineOptions } from '../../lib/index.js';
import { fixture } from './support/paths.js';
import { open } from './support/pipelines.js';

const MIB = 2 ** 20;

// Room for one session; sharing would hide what swapping does.
const SMALL = {
  sessionLen: 512,
  maxPrefillTokenNum: 256,
  enablePrefixCaching: false,
  speculativeConfig: { method: 'none' },
} as const;
const { kvBlockBytes } = await estimate(undefined, { device: 'cpu', ...SMALL });
const POOL = { ...SMALL, kvCacheBytes: 8 * kvBlockBytes };
const PROMPTS = [
  'Spell the word house.',
  'What is 27 + 45?',
  { text: 'What is in the picture?', images: [fixture('10-shapes-224x224.png')] },
  'Reverse the word cat.',
];
// The three texts alone pass the pool, so that blocks run out whenever the picture arrives.
const LONG = { maxNewTokens: 150, ignoreEos: true };

async function preempting(options: PipelineOptions) {
  const pipe = await open(options);
  const together = await pipe(PROMPTS, LONG);
  return { pipe, tokens: together.map(({ tokenIds }) => tokenIds) };
}

describe('a pool too small for all', () => {
  test('requests swapped to host memory answer as they do alone', async () => {
    const { pipe, tokens } = await preempting({ ...POOL, swapSpaceBytes: 64 * kvBlockBytes });
    const { preemptions, swapsOut, swapsIn, swapBlocks, freeSwapBlocks } = pipe.stats();
    expect(preemptions).toBeGreaterThan(0);
    // Copies in memory are far cheaper than any model.
    expect(swapsOut).toBe(preemptions);
    expect(swapsIn).toBe(swapsOut);
    expect(freeSwapBlocks).toBe(swapBlocks);
    const { engine, histograms } = pipe.metrics();
    expect(engine).toMatchObject({ preemptions, swapsOut, swapsIn });
    expect(histograms.stepSeconds.count).toBe(engine.steps);
    expect(histograms.stepSeconds.sum).toBeGreaterThan(0);

    const recomputing = await preempting(POOL);
    expect(recomputing.pipe.stats()).toMatchObject({ swapBlocks: 0, swapsOut: 0 });
    expect(recomputing.pipe.stats().preemptions).toBeGreaterThan(0);
    expect(tokens).toEqual(recomputing.tokens);
    for (const [i, prompt] of PROMPTS.entries()) {
      expect((await recomputing.pipe(prompt, LONG)).tokenIds).toEqual(tokens[i]);
    }
    expect(recomputing.pipe.stats().promptTokens).toBeGreaterThan(pipe.stats().promptTokens);
  });

  test('an abort gives host memory back', async () => {
    const pipe = await open({ ...POOL, swapSpaceBytes: 64 * kvBlockBytes });
    const abort = new AbortController();
    const answers = PROMPTS.map((prompt) =>
      pipe(prompt, { ...LONG, maxNewTokens: 300, signal: abort.signal }),
    );
    const settled = Promise.allSettled(answers);
    while (pipe.stats().swapsOut === pipe.stats().swapsIn) {
      await new Promise((resolve) => setImmediate(resolve));
    }
    abort.abort();
    await settled;
    const { tokenIds } = await pipe('Hello!', { maxNewTokens: 4, ignoreEos: true });
    expect(tokenIds.length).toBe(4);
    const { freeSwapBlocks, swapBlocks, freeBlocks, totalBlocks } = pipe.stats();
    expect(freeSwapBlocks).toBe(swapBlocks);
    expect(freeBlocks).toBe(totalBlocks);
  });
});

describe('the swap space in the plan', () => {
  test('is counted, capped at what can be of use, and taken at load', async () => {
    const options = { ...POOL, maxBatchSize: 4, swapSpaceBytes: 1024 * MIB } as const;
    const plan = await estimate(undefined, { device: 'cpu', ...options });
    expect(plan.swapBlocks).toBe(4 * 8);
    expect(plan.hostSwapBytes).toBe(plan.swapBlocks * plan.kvBlockBytes);
    const without = await estimate(undefined, { device: 'cpu', ...options, swapSpaceBytes: 0 });
    expect(plan.totalBytes - without.totalBytes).toBe(plan.hostSwapBytes);
    const report = (await open(options)).memory();
    expect(report.swapBlocks).toBe(plan.swapBlocks);
    expect(report.use.hostSwapBytes).toBe(plan.hostSwapBytes);
    expect(report.allocatedBytes).toBe(report.totalBytes);
  });

  test.each([
    [
      { swapSpaceBytes: 1000 },
      'ERR_TM_INVALID_ARGUMENT',
      /swapSpaceBytes is 1000, less than one KV/,
    ],
    [{ swapSpaceBytes: -1 }, 'ERR_TM_INVALID_OPTION', /swapSpaceBytes/],
    [
      { swapSpaceBytes: 2 ** 50, maxBatchSize: 4096, sessionLen: 2048 },
      'ERR_TM_OUT_OF_MEMORY',
      /swap space .* MiB/,
    ],
  ] as const)('%o is refused with the reason', async (options, code, message) => {
    const refused = { code, message: expect.stringMatching(message) };
    await expect(estimate(undefined, { device: 'cpu', ...options })).rejects.toMatchObject(refused);
  });
});

describe('plan and use', () => {
  test.each([{}, { quantPolicy: 8, swapSpaceBytes: 16 * kvBlockBytes }] as const)(
    'what is taken is what was planned, after loading and after work, %o',
    async (given) => {
      const pipe = await open({ ...POOL, ...given });
      const check = (): void => {
        const { use, ...plan } = pipe.memory();
        expect(use.decoderBytes).toBe(plan.weightBytes + plan.activationBytes);
        expect(use.visionBytes).toBe(plan.visionWeightBytes + plan.visionActivationBytes);
        expect(use.workspaceBytes).toBe(plan.scratchBytes + plan.samplingBytes);
        expect(use.kvCacheBytes).toBe(plan.kvCacheBytes);
        expect(use.imageEmbeddingBytes).toBe(plan.imageEmbeddingBytes);
        expect(plan.allocatedBytes).toBe(plan.totalBytes);
      };
      check();
      await pipe(PROMPTS, { ...LONG, maxNewTokens: 40 });
      check();
      expect(pipe.memory().deviceFreeBytes).toBeGreaterThan(0);
    },
  );
});
