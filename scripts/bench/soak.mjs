// `npm run soak [-- --minutes 30]`: mixed load on the embedded model: texts, pictures, schemas,
// samples, n choices, streams, random aborts, up to 256 streams at once. Checks that every request
// ends once and as it should, that memory stays flat, that the event loop stays free and that the
// engine is idle afterwards. Reports JSON; exits 1 when a check fails.
import { join } from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { setTimeout as wait } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { pipeline, TurbomindError } from '../../dist/index.js';
import { root } from '../lib.mjs';

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

const picture = join(root, 'examples', 'shapes.png');
const schema = {
  type: 'object',
  properties: {
    name: { type: 'string', maxLength: 12 },
    count: { type: 'integer', minimum: 0, maximum: 99 },
    tags: { type: 'array', items: { enum: ['a', 'b', 'c'] }, maxItems: 3 },
  },
  required: ['name', 'count'],
};
let state = Number(values.seed);
const random = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
};
const pick = (list) => list[Math.floor(random() * list.length)];

const KINDS = {
  text: () => ['What is 27 + 45?', {}],
  long: () => [
    `Hello! ${'word '.repeat(Math.floor(random() * 200))}`,
    { ignoreEos: true, maxNewTokens: 80 },
  ],
  sampled: () => [
    'Hello!',
    { doSample: true, temperature: 1.2, ignoreEos: true, maxNewTokens: 60 },
  ],
  picture: () => [{ text: 'What colour is the largest shape?', images: [picture] }, {}],
  schema: () => [
    'Hello!',
    {
      doSample: true,
      responseFormat: { type: 'json_schema', jsonSchema: { schema } },
      maxNewTokens: null,
    },
  ],
  choice: () => ['Hello!', { responseFormat: { type: 'choice', choices: ['yes', 'no', 'maybe'] } }],
  several: () => ['Hello!', { doSample: true, n: 2, maxNewTokens: 40 }],
  words: () => ['Spell the word house.', { stopWords: ['s'], logprobs: 2 }],
};
const WEIGHTS = [
  'text',
  'long',
  'long',
  'sampled',
  'sampled',
  'schema',
  'choice',
  'several',
  'words',
];

// A pool that fills while the soak warms up: shared prefixes keep its blocks until it is full, so memory
// grows to the plan first and must be flat from there.
const POOL_BYTES = 384 * 2 ** 20;
const pipe = await pipeline({ device: 'cpu', maxBatchSize: 256, kvCacheBytes: POOL_BYTES });
const counts = { started: 0, finished: 0, aborted: 0, broken: 0, failed: 0, tokens: 0 };
const byKind = {};
const problems = [];
/** What the picture's first answer was. */
let seen;
const memory = [];
const loop = monitorEventLoopDelay({ resolution: 1 });
const startedAt = performance.now();
const endAt = startedAt + minutes * 60_000;
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

await Promise.all(Array.from({ length: numStreams }, (_, index) => client(index)));
loop.disable();
clearInterval(watch);
void warm;
const idle = await untilIdle();
const metrics = pipe.metrics();
await pipe.close();
report();

async function client(index) {
  // A few look at pictures, which cost most.
  while (performance.now() < endAt) {
    const kind = index % 64 === 0 ? 'picture' : pick(WEIGHTS);
    await one(kind);
  }
}

async function one(kind) {
  const [prompt, options] = KINDS[kind]();
  const abort = random() < 0.15 ? new AbortController() : undefined;
  const leaveAfter = random() < 0.1 ? Math.floor(random() * 20) : Number.POSITIVE_INFINITY;
  if (abort) setTimeout(() => abort.abort(new Error('soak')), random() * 400).unref();
  counts.started += 1;
  byKind[kind] = (byKind[kind] ?? 0) + 1;
  let parts = 0;
  const ends = [];
  try {
    for await (const part of pipe.stream(prompt, { ...options, signal: abort?.signal })) {
      parts += 1;
      counts.tokens += part.tokenIds.length;
      if (part.response) ends.push(part.response);
      if (parts > leaveAfter) break;
    }
    if (parts > leaveAfter) counts.aborted += 1;
    else finish(kind, ends, options);
  } catch (error) {
    if (abort?.signal.aborted && error === abort.signal.reason) counts.aborted += 1;
    else {
      counts.broken += 1;
      const isOurs = error instanceof TurbomindError;
      fail(kind, isOurs ? `${error.code}: ${error.message}` : String(error));
    }
  }
}

function finish(kind, ends, options) {
  counts.finished += 1;
  if (ends.length !== (options.n ?? 1)) fail(kind, `${ends.length} ends`);
  for (const { finishReason, text } of ends) {
    if (finishReason !== 'stop' && finishReason !== 'length')
      fail(kind, `ended by ${finishReason}`);
    if (kind === 'text' && text !== '72') fail(kind, `said ${JSON.stringify(text)}`);
    if (kind === 'picture' && text !== 'red') note(kind, text);
    if (kind === 'choice' && !['yes', 'no', 'maybe'].includes(text)) fail(kind, `said ${text}`);
    if (kind === 'schema' && finishReason === 'stop') checkSchema(text);
  }
}

// The same picture has the same answer, whoever else runs.
function note(kind, text) {
  seen ??= text;
  if (text !== seen) fail(kind, `said ${JSON.stringify(text)} and ${JSON.stringify(seen)}`);
}

function checkSchema(text) {
  try {
    const { name, count } = JSON.parse(text);
    if (typeof name !== 'string' || !(count >= 0 && count <= 99)) fail('schema', text);
  } catch (error) {
    fail('schema', `${error.message}: ${text}`);
  }
}

function fail(kind, problem) {
  counts.failed += 1;
  if (problems.length < 20) problems.push({ kind, problem });
}

async function untilIdle() {
  for (let tries = 0; tries < 200; tries += 1) {
    const { running, waiting, freeBlocks, totalBlocks } = pipe.stats();
    if (running === 0 && waiting === 0) return { running, waiting, freeBlocks, totalBlocks };
    await wait(25);
  }
  return pipe.stats();
}

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
    noFailures: counts.failed === 0,
    everyRequestEnds: counts.started === counts.finished + counts.aborted + counts.broken,
    idleAfterwards: idle.running === 0 && idle.waiting === 0,
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
    counts,
    byKind,
    eventLoopDelayMs: { ...percentiles, mean: round(loop.mean / 1e6) },
    rssMib: { first: round(memory[0]?.[1] ?? 0), last: round(memory.at(-1)?.[1] ?? 0) },
    growthMibPerMinute: round(slope),
    idle,
    metrics: { requests: metrics.requests, tokens: metrics.tokens, engine: metrics.engine },
    checks,
    problems,
  };
  console.log(JSON.stringify(result, undefined, 1));
  process.exitCode = Object.values(checks).every(Boolean) ? 0 : 1;
}

function round(number) {
  return Math.round(number * 100) / 100;
}
