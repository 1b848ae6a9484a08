// What a service sees on a GPU, through the public API, as JSON: whether a full memory plan holds under
// many mixed requests, how running streams fare while long prompts arrive, what a second question about
// the same picture costs, and the first request against the tenth. Each part opens its own pipeline.
// Exits 1 if a request fails; without a usable GPU it prints SKIP and exits 0.
//   node scripts/gpu/bench-service.mjs MODEL [--parts full,arrivals,picture,first] [--requests 256]
//     [--quant 0,8,4] [--session 8448] [--streams 16] [--long 8000] [--prompts 6] [--chunk 512] [--goal MS]
//     [--device cuda] [--out FILE]
// arrivals: --prompts long prompts, one after the other, while --streams decode; --goal is maxInterTokenLatencyMs.
import { writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import sharp from 'sharp';
import { usableGpu } from './usable-gpu.mjs';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    parts: { type: 'string', default: 'full,arrivals,picture,first' },
    requests: { type: 'string', default: '256' },
    quant: { type: 'string', default: '0,8,4' },
    session: { type: 'string', default: '8448' },
    streams: { type: 'string', default: '16' },
    long: { type: 'string', default: '8000' },
    chunk: { type: 'string', default: '512' },
    goal: { type: 'string' },
    prompts: { type: 'string', default: '6' },
    device: { type: 'string', default: 'cuda' },
    out: { type: 'string' },
  },
});
const model = positionals[0];
if (!model) throw new Error('usage: bench-service.mjs MODEL [options]; see the head of this file');
const { pipeline } = await import(pathToFileURL(join(root, 'dist', 'index.js')));
const found = await usableGpu(flags.device);

let state = 7;
function random(limit) {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return Math.floor((state / 2 ** 32) * limit);
}
// One token a letter with the byte tokenizer of make_checkpoint.py's folders.
const letters = (count) =>
  Array.from({ length: count }, () => String.fromCharCode(97 + random(26))).join('');
const round = (value) => Number(value.toFixed(3));
function quantile(list, share) {
  const sorted = [...list].sort((a, b) => a - b);
  return sorted.length === 0
    ? 0
    : sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}
const summary = (list) => ({
  count: list.length,
  p50: round(quantile(list, 0.5)),
  p99: round(quantile(list, 0.99)),
  max: round(quantile(list, 1)),
});

const report = { model, gpu: found.devices, parts: {} };
const session = Number(flags.session);

/** Runs `body` with a pipeline of its own. */
async function withPipeline(options, body) {
  const pipe = await pipeline(model, { device: flags.device, sessionLen: session, ...options });
  try {
    return await body(pipe);
  } finally {
    await pipe.close();
  }
}

// cacheMaxEntryCount 0.95 and more requests than fit at once: all must end, none may fail.
async function full(quantPolicy) {
  const count = Number(flags.requests);
  const options = { cacheMaxEntryCount: 0.95, maxBatchSize: count, quantPolicy };
  return await withPipeline(options, async (pipe) => {
    const prompts = [];
    const settings = [];
    for (let i = 0; i < count; i += 1) {
      const long = random(10) === 0;
      prompts.push(letters(long ? 2000 + random(5000) : 16 + random(1000)));
      const drawn = random(3) === 0 ? { doSample: true, topP: 0.9, randomSeed: i } : {};
      settings.push({ maxNewTokens: 16 + random(112), ignoreEos: true, ...drawn });
    }
    const begin = performance.now();
    const responses = await pipe(prompts, settings);
    const seconds = (performance.now() - begin) / 1000;
    const failed = responses.filter(({ finishReason }) => finishReason !== 'length');
    const tokens = responses.reduce((sum, { generateTokenLen }) => sum + generateTokenLen, 0);
    const prompt = responses.reduce((sum, { inputTokenLen }) => sum + inputTokenLen, 0);
    const { totalBlocks, kvCacheBytes, preemptions } = pipe.stats();
    if (failed.length > 0) process.exitCode = 1;
    return {
      quantPolicy,
      requests: count,
      failed: failed.length,
      firstFailure: failed[0]?.error?.message,
      promptTokens: prompt,
      newTokens: tokens,
      seconds: round(seconds),
      newTokensPerSecond: round(tokens / seconds),
      totalBlocks,
      kvCacheGB: round(kvCacheBytes / 1e9),
      preemptions,
    };
  });
}

// Times between the parts of one stream until `stop`; the first token does not count.
async function watch(pipe, gaps, stop) {
  let last;
  for await (const { tokenIds } of pipe.stream(letters(200), {
    maxNewTokens: session - 400,
    ignoreEos: true,
  })) {
    if (stop()) break;
    if (tokenIds.length === 0) continue;
    const now = performance.now();
    if (last !== undefined) gaps.push(now - last);
    last = now;
  }
}

async function arrivals() {
  const options = {
    maxPrefillTokenNum: Number(flags.chunk),
    maxBatchSize: 64,
    ...(flags.goal === undefined ? {} : { maxInterTokenLatencyMs: Number(flags.goal) }),
  };
  return await withPipeline(options, async (pipe) => {
    let gaps = [];
    let stopped = false;
    const proxy = { push: (ms) => gaps.push(ms) };
    const streams = Array.from({ length: Number(flags.streams) }, () =>
      watch(pipe, proxy, () => stopped),
    );
    const phase = async (body) => {
      gaps = [];
      await body();
      return gaps;
    };
    const tokens = async (count) => {
      await pipe(letters(16), { maxNewTokens: count, ignoreEos: true });
    };
    await tokens(64); // all streams run
    const quiet = await phase(() => tokens(256));
    const long = [];
    const loaded = await phase(async () => {
      for (let i = 0; i < Number(flags.prompts); i += 1) {
        const { timings } = await pipe(letters(Number(flags.long)), {
          maxNewTokens: 1,
          ignoreEos: true,
        });
        long.push(round(timings.firstTokenMs));
      }
    });
    stopped = true;
    await Promise.all(streams);
    const before = summary(quiet);
    const during = summary(loaded);
    return {
      streams: streams.length,
      chunk: Number(flags.chunk),
      goalMs: flags.goal === undefined ? null : Number(flags.goal),
      quietMs: before,
      loadedMs: during,
      p99Ratio: round(during.p99 / before.p99),
      longFirstTokenMs: long,
    };
  });
}

// A picture of random pixels that is cut into 12 tiles and a thumbnail.
function picture() {
  const data = new Uint8Array(1792 * 1344 * 3);
  for (let i = 0; i < data.length; i += 1) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    data[i] = state >>> 24;
  }
  return { data, width: 1792, height: 1344, channels: 3 };
}

async function secondQuestion() {
  return await withPipeline({}, async (pipe) => {
    const ask = async (image, text) => {
      const content = [
        { type: 'image', image },
        { type: 'text', text },
      ];
      const response = await pipe([{ role: 'user', content }], {
        maxNewTokens: 4,
        ignoreEos: true,
      });
      const { firstTokenMs, preprocessMs, visionMs, prefillMs } = response.timings;
      return {
        inputTokens: response.inputTokenLen,
        cachedTokens: response.cachedTokens,
        firstTokenMs: round(firstTokenMs),
        preprocessMs: round(preprocessMs),
        visionMs: round(visionMs),
        prefillMs: round(prefillMs),
      };
    };
    await ask(picture(), 'warm'); // another picture: kernels and graphs are loaded
    const askTwice = async (image) => {
      const first = await ask(image, letters(64));
      const second = await ask(image, letters(64));
      return { first, second, ratio: round(second.firstTokenMs / first.firstTokenMs) };
    };
    const encoded = async ({ data, ...raw }) => await sharp(data, { raw }).jpeg().toBuffer();
    await ask(await encoded(picture()), 'warm');
    const report = { raw: [], jpeg: [] };
    for (let i = 0; i < 3; i += 1) {
      report.raw.push(await askTwice(picture()));
      report.jpeg.push(await askTwice(await encoded(picture())));
    }
    return report;
  });
}

async function firstAgainstTenth() {
  return await withPipeline({}, async (pipe) => {
    const times = [];
    const parts = [];
    for (let i = 0; i < 10; i += 1) {
      const { timings } = await pipe(letters(1000), { maxNewTokens: 16, ignoreEos: true });
      times.push(round(timings.firstTokenMs));
      parts.push({
        preprocessMs: round(timings.preprocessMs),
        prefillMs: round(timings.prefillMs),
        decodeMs: round(timings.decodeMs),
      });
    }
    const { loadMs } = pipe.stats();
    return {
      loadMs: round(loadMs),
      firstTokenMs: times,
      ratio: round(times[0] / times[9]),
      first: parts[0],
      second: parts[1],
      tenth: parts[9],
    };
  });
}

const parts = {
  full: async () => {
    const runs = [];
    for (const quant of flags.quant.split(',')) runs.push(await full(Number(quant)));
    return runs;
  },
  arrivals,
  picture: secondQuestion,
  first: firstAgainstTenth,
};
for (const name of flags.parts.split(',')) {
  if (parts[name] === undefined) throw new Error(`no part '${name}'; parts: ${Object.keys(parts)}`);
  try {
    report.parts[name] = await parts[name]();
  } catch (error) {
    process.exitCode = 1;
    report.parts[name] = { error: `${error.code ?? ''} ${error.message}` };
  }
  console.log(name, JSON.stringify(report.parts[name]));
  if (flags.out) writeFileSync(flags.out, `${JSON.stringify(report, null, 1)}\n`);
}
