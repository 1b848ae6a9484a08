// The memory plan through the public API: estimated, loaded and used numbers agree; amounts are
// honoured or refused with the numbers; quantised caches hold more, and answer the same alone and in a
// batch. How near their answers are to unquantised ones: scripts/bench/kv-quality.mjs.
import { describe, expect, test } from 'vitest';
import { estimate, type MemoryReport, pipeline } from '../../lib/index.js';
import { open } from './support/pipelines.js';

const MIB = 2 ** 20;

// Free memory changes by itself; all else is the same before and after loading.
function planned({
  freeBytes,
  allocatedBytes,
  deviceFreeBytes,
  use,
  ...plan
}: MemoryReport): object {
  expect(freeBytes).toBeGreaterThan(0);
  expect(allocatedBytes).toBeGreaterThanOrEqual(0);
  expect(deviceFreeBytes).toBeGreaterThanOrEqual(0);
  expect(use.kvCacheBytes).toBeLessThanOrEqual(plan.kvCacheBytes);
  return plan;
}

describe('the plan', () => {
  test.each([
    {},
    { quantPolicy: 8, maxBatchSize: 7 },
    { quantPolicy: 4, maxPrefillTokenNum: 100, threads: 1 },
  ] as const)('estimate equals memory() after loading, %o', async (given) => {
    const options = { kvCacheBytes: 64 * MIB, ...given };
    const report = (await open(options)).memory();
    expect(planned(await estimate(undefined, { device: 'cpu', ...options }))).toEqual(
      planned(report),
    );
    expect(report.allocatedBytes).toBe(report.totalBytes);
    expect(report.kvCacheBytes).toBe(report.kvBlocks * report.kvBlockBytes);
    expect(report.kvBlocks).toBe(Math.floor((64 * MIB) / report.kvBlockBytes));
  });

  test('memoryBudgetBytes holds everything', async () => {
    const report = (await open({ memoryBudgetBytes: 300 * MIB })).memory();
    expect(report.totalBytes).toBeLessThanOrEqual(300 * MIB);
    expect(report.totalBytes).toBeGreaterThan(300 * MIB - report.kvBlockBytes);
  });

  test('8 and 4 bits hold more tokens in the same memory', async () => {
    const blocks = await Promise.all(
      ([0, 8, 4] as const).map(async (quantPolicy) => {
        const report = await estimate(undefined, {
          device: 'cpu',
          quantPolicy,
          kvCacheBytes: 64 * MIB,
        });
        return report.kvBlocks;
      }),
    );
    const [full = 0, eight = 0, four = 0] = blocks;
    expect(eight).toBeGreaterThan(3.4 * full);
    expect(four).toBeGreaterThan(5.9 * full);
  });

  test.each([
    [{ kvCacheBytes: 2 ** 50 }, /kvCacheBytes is 1073741824\.0 MiB, but .* MiB free/],
    [{ kvCacheBytes: 1000 }, /one session of \d+ tokens takes \d+ blocks/],
    [{ memoryBudgetBytes: 2 ** 50 }, /memoryBudgetBytes is .* MiB are free/],
    [{ memoryBudgetBytes: MIB }, /takes .* MiB without a KV cache \(weights .* budgeted/],
  ] as const)('%o is refused with the numbers', async (options, message) => {
    const refused = { code: 'ERR_TM_OUT_OF_MEMORY', message: expect.stringMatching(message) };
    await expect(pipeline({ device: 'cpu', ...options })).rejects.toMatchObject(refused);
    await expect(estimate(undefined, { device: 'cpu', ...options })).rejects.toMatchObject(refused);
  });

  test('a device of a given size can be planned for', async () => {
    const given = { device: 'cpu', cacheMaxEntryCount: 0.5, freeBytes: 400 * MIB } as const;
    const report = await estimate(undefined, given);
    expect(report.freeBytes).toBe(400 * MIB);
    const parts = report.totalBytes - report.kvCacheBytes;
    expect(report.kvCacheBytes).toBeLessThanOrEqual((400 * MIB - parts) * 0.5);
  });
});

describe('under load', () => {
  test('0.97 of memory and a batch of 256 serve 64 requests to the end', async () => {
    const pipe = await open({ cacheMaxEntryCount: 0.97, maxBatchSize: 256, sessionLen: 512 });
    const before = pipe.memory();
    const prompts = Array.from({ length: 64 }, (_, i) => `What is ${i} + ${100 - i}?`);
    const responses = await pipe(prompts, { maxNewTokens: 8, ignoreEos: true });
    expect(responses.map(({ finishReason }) => finishReason)).toEqual(prompts.map(() => 'length'));
    expect(planned(pipe.memory())).toEqual(planned(before));
    expect(pipe.memory().allocatedBytes).toBe(before.allocatedBytes);
  });

  test.each([8, 4] as const)('%d bits answer', async (quantPolicy) => {
    const pipe = await open({ quantPolicy, kvCacheBytes: 64 * MIB });
    expect((await pipe('Hello!')).text.length).toBeGreaterThan(0);
    const long = { maxNewTokens: 40, ignoreEos: true };
    const alone = await pipe('Spell the word house.', long);
    const together = await pipe(['What is 27 + 45?', 'Spell the word house.', 'Hello!'], long);
    expect(together[1]?.tokenIds).toEqual(alone.tokenIds);
  });
});
