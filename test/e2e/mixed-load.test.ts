// The load of `npm run soak` for some seconds: every request ends once and as it should, whatever
// else runs, in a pool that is too small for all. Memory and event-loop delay are the soak's.
import { expect, test } from 'vitest';
import { pipeline } from '../../lib/index.js';
import { isSound, runMixedLoad } from '../../scripts/bench/mixed-load.mjs';

test('mixed requests and aborts: none fails, and the engine is idle afterwards', async () => {
  await using pipe = await pipeline({
    device: 'cpu',
    maxBatchSize: 24,
    kvCacheBytes: 48 * 2 ** 20,
  });
  const load = await runMixedLoad(pipe, { seconds: 10, streams: 48, pictureEvery: 16, seed: 7 });
  expect(load.problems).toEqual([]);
  expect(isSound(load)).toEqual({ noFailures: true, everyRequestEnds: true, idleAfterwards: true });
  // Every kind was among them, and some were given up.
  expect(Object.keys(load.byKind).sort()).toEqual(
    ['choice', 'long', 'picture', 'sampled', 'schema', 'several', 'text', 'words'].sort(),
  );
  expect(load.counts.aborted).toBeGreaterThan(0);
  expect(load.counts.finished).toBeGreaterThan(load.counts.aborted);
});
