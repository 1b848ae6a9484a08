// `npm run soak [-- --minutes 30]`: the mixed load of mixed-load.mjs on the embedded model, up to 256
// streams at once. Checks that every request ends once and as it should, that memory stays flat, that
// the event loop stays free and that the engine is idle afterwards. Reports JSON; exits 1 when a check
// fails.
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { setTimeout as wait } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { pipeline } from '../../dist/index.js';
import { isSound, runMixedLoad } from './mixed-load.mjs';

const { values } = parseArgs({
  options: {
    minutes: { type: 'string', default: '30' },
    streams: { type: 'string', default: '256' },
    seed: { type: 'string', default: '1' },
    'loop-ms': { type: 'string', default: '20' },
  },
});
const minutes = Number(values.minutes);
const numStreams = Number(values.streams);
const MAX_LOOP_MS = Number(values['loop-ms']);
/** Above what a warm process still gains from caches that fill. */
const MAX_GROWTH_MIB_PER_MINUTE = 2;
const WARM_UP_SHARE = 0.25;

// A pool that fills while the soak warms up: shared prefixes keep its blocks until it is full, so memory
// grows to the plan first and must be flat from there.
const POOL_BYTES = 384 * 2 ** 20;
const pipe = await pipeline({ device: 'cpu', maxBatchSize: 256, kvCacheBytes: POOL_BYTES });
const memory = [];
const loop = monitorEventLoopDelay({ resolution: 1 });
const startedAt = performance.now();
const elapsed = () => (performance.now() - startedAt) / 60_000;

const watch = setInterval(
  () => {
    globalThis.gc?.();
    memory.push([elapsed(), process.memoryUsage().rss / 2 ** 20]);
  },
  Math.max(250, minutes * 500),
);
const warm = wait(minutes * 60_000 * WARM_UP_SHARE, undefined, { ref: false }).then(() =>
  loop.enable(),
);

const load = await runMixedLoad(pipe, {
  seconds: minutes * 60,
  streams: numStreams,
  pictureEvery: 64,
  seed: Number(values.seed),
});
loop.disable();
clearInterval(watch);
void warm;
const metrics = pipe.metrics();
await pipe.close();
report();

// Least squares over the samples behind the warm-up, in MiB a minute.
function growth() {
  const late = memory.filter(([time]) => time > minutes * WARM_UP_SHARE);
  const meanX = late.reduce((sum, [x]) => sum + x, 0) / late.length;
  const meanY = late.reduce((sum, [, y]) => sum + y, 0) / late.length;
  const over = late.reduce((sum, [x, y]) => sum + (x - meanX) * (y - meanY), 0);
  const under = late.reduce((sum, [x]) => sum + (x - meanX) ** 2, 0);
  return under === 0 ? 0 : over / under;
}

function report() {
  const p99 = loop.percentile(99) / 1e6;
  const slope = growth();
  const checks = {
    ...isSound(load),
    eventLoop: p99 < MAX_LOOP_MS,
    // A short run says nothing about growth.
    memory: minutes < 5 || slope < MAX_GROWTH_MIB_PER_MINUTE,
  };
  const percentiles = Object.fromEntries(
    [50, 90, 95, 99, 99.9, 100].map((share) => [`p${share}`, round(loop.percentile(share) / 1e6)]),
  );
  const result = {
    minutes: round(elapsed()),
    streams: numStreams,
    counts: load.counts,
    byKind: load.byKind,
    eventLoopDelayMs: { ...percentiles, mean: round(loop.mean / 1e6) },
    rssMib: { first: round(memory[0]?.[1] ?? 0), last: round(memory.at(-1)?.[1] ?? 0) },
    growthMibPerMinute: round(slope),
    idle: load.idle,
    metrics: { requests: metrics.requests, tokens: metrics.tokens, engine: metrics.engine },
    checks,
    problems: load.problems,
  };
  console.log(JSON.stringify(result, undefined, 1));
  process.exitCode = Object.values(checks).every(Boolean) ? 0 : 1;
}

function round(number) {
  return Math.round(number * 100) / 100;
}
