// `npm run bench:gpu`: whole requests through the public API on a GPU: time to the first token, decode
// steps and loading, as JSON. Prompts are random letters, one token each with the byte tokenizer of
// make_checkpoint.py's folders. Without a usable GPU it prints SKIP and exits 0.
//   node scripts/gpu/bench-gpu.mjs MODEL [--batch 1,16,64] [--context 1024] [--new 64] [--repeats 3] [--picture]
//     [--device cuda] [--out FILE] [--trace FILE]
//   node scripts/gpu/bench-gpu.mjs MODEL --kernels libstep_trace.so --peaks PEAKS.json [the same options]
// --kernels runs all that in a traced child process (test/kernels/step_trace.cc; libcupti is needed, TM_CUPTI
// names it) and prints a table of each configuration's decode step and prefill against --peaks, which
// device_peaks.py measured. --picture adds a picture of 12 tiles and a thumbnail at batch 1. --trace writes what
// reference_logits.py compares: a few requests alone and together, 33 tokens each.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import { decoderShape, readTrace, splitSteps, tableOf, toMarkdown } from './step-table.mjs';
import { usableGpu } from './usable-gpu.mjs';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    batch: { type: 'string', default: '1,16,64' },
    context: { type: 'string', default: '1024' },
    new: { type: 'string', default: '64' },
    repeats: { type: 'string', default: '3' },
    session: { type: 'string', default: '2048' },
    device: { type: 'string', default: 'cuda' },
    picture: { type: 'boolean', default: false },
    out: { type: 'string' },
    trace: { type: 'string' },
    kernels: { type: 'string' },
    peaks: { type: 'string' },
    windows: { type: 'string' },
    dtype: { type: 'string', default: 'auto' },
    quant: { type: 'string', default: '0' },
  },
});
const model = positionals[0];
if (!model) throw new Error('usage: bench-gpu.mjs MODEL [options]; see the head of this file');
if (flags.kernels) {
  tabulate();
  process.exit(0);
}
const { pipeline } = await import(pathToFileURL(join(root, 'dist', 'index.js')));
await usableGpu(flags.device);
// This very benchmark in a process whose driver loads the tracer, then the tables of what it traced.
function tabulate() {
  const folder = mkdtempSync(join(tmpdir(), 'tm-trace-'));
  const windows = join(folder, 'windows.json');
  const skipped = new Set(['--kernels', '--peaks', '--out']);
  const args = process.argv.slice(2).filter((text, i, all) => {
    const name = text.split('=')[0];
    return !skipped.has(name) && !(skipped.has(all[i - 1]) && !all[i - 1].includes('='));
  });
  const env = {
    ...process.env,
    CUDA_INJECTION64_PATH: resolve(flags.kernels),
    TM_TRACE_OUT: join(folder, 'trace'),
  };
  const self = fileURLToPath(import.meta.url);
  const child = spawnSync(process.execPath, [self, ...args, '--windows', windows], {
    env,
    stdio: 'inherit',
  });
  if (child.status !== 0) throw new Error(`the traced run ended with ${child.status}`);
  const { pid, runs } = JSON.parse(readFileSync(windows, 'utf8'));
  const peaks = JSON.parse(readFileSync(flags.peaks, 'utf8'));
  const steps = splitSteps(readTrace(join(folder, `trace.${pid}`)));
  const shape = decoderShape(model, Number(flags.quant) || 16);
  const rowsOf = (step) => step.kernels.find(({ name }) => name.startsWith('embed'))?.grid[0] ?? 0;
  const tables = [];
  for (const { context, batch, from, to } of runs) {
    const within = steps.filter(({ begin }) => begin >= from * 1e6 && begin <= to * 1e6);
    for (const decode of [true, false]) {
      const kind = within.filter((step) => step.decode === decode);
      const rows = Math.max(0, ...kind.map(rowsOf));
      const same = kind.filter((step) => rowsOf(step) === rows);
      if (rows === 0 || same.length === 0) continue;
      if (decode && rows < batch) {
        console.log(`batch ${batch}, context ${context}: no step had all requests; raise --new`);
        continue;
      }
      const tokens = decode ? context + Number(flags.new) / 2 : context;
      const table = tableOf(same, shape, { rows, context: tokens, batch }, peaks);
      const what = decode ? `decode, batch ${batch}, context ${context}` : `prefill, ${rows} rows`;
      tables.push({ what, context, batch, decode, rows, steps: same.length, ...table });
      console.log(toMarkdown(what, table));
    }
  }
  if (tables.length === 0) throw new Error(`${steps.length} steps, none to tabulate, in ${folder}`);
  if (flags.out) writeFileSync(flags.out, `${JSON.stringify({ model, peaks, tables }, null, 1)}\n`);
  rmSync(folder, { recursive: true });
}

const realtime = () => performance.timeOrigin + performance.now();
const numbers = (text) => text.split(',').map(Number);
const median = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)];
const round = (value, digits = 3) => Number(value.toFixed(digits));

let state = 1;
function letters(count) {
  let text = '';
  while (text.length < count) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    text += String.fromCharCode(97 + ((state >>> 24) % 26));
  }
  return text;
}

// A picture of random pixels.
function picture(width, height) {
  const data = new Uint8Array(width * height * 3);
  for (let i = 0; i < data.length; i += 1) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    data[i] = state >>> 24;
  }
  return { data, width, height, channels: 3 };
}

const batches = numbers(flags.batch);
const openedAt = performance.now();
const pipe = await pipeline(model, {
  device: flags.device,
  sessionLen: Number(flags.session),
  maxBatchSize: Math.max(64, ...batches),
  dtype: flags.dtype,
  quantPolicy: Number(flags.quant),
  speculativeConfig: { method: 'none' }, // a step is to mean a token
});
const openMs = performance.now() - openedAt;
const stats = pipe.stats();
const report = {
  model,
  device: `${stats.deviceName}; ${stats.deviceDescription}`,
  openMs: round(openMs),
  loadMs: round(stats.loadMs),
  weightGB: round(stats.weightBytes / 1e9),
  loadGBperSecond: round(stats.weightBytes / 1e6 / stats.loadMs),
  kvCacheGB: round(stats.kvCacheBytes / 1e9),
  workspaceGB: round(stats.workspaceBytes / 1e9),
  runs: [],
};
console.log(JSON.stringify(report));

const newTokens = Number(flags.new);
// While the last prompt is computed the first requests go on: their tokens are extra ones.
const prefillSteps = (context, batch) => Math.ceil((batch * context) / Number(flags.session)) + 2;

// One batch, every token timed: until the last request has its first token, and a step while all of
// them decode together, which is the time a service of that many streams sees.
async function timed(prompts, maxNewTokens) {
  const begin = performance.now();
  const arrivals = await Promise.all(
    prompts.map(async (prompt) => {
      const times = [];
      for await (const { tokenIds } of pipe.stream(prompt, { maxNewTokens, ignoreEos: true })) {
        const now = performance.now();
        for (const _ of tokenIds) times.push(now);
      }
      return times;
    }),
  );
  const allBegan = Math.max(...arrivals.map((times) => times[0]));
  const oneEnded = Math.min(...arrivals.map((times) => times.at(-1)));
  const within = arrivals[0].filter((at) => at >= allBegan && at <= oneEnded);
  if (within.length < 3)
    throw new Error(`${prompts.length} requests were never all at work; raise --new`);
  return {
    firstMs: allBegan - begin,
    stepMs: (within.at(-1) - within[0]) / (within.length - 1),
  };
}
const windows = [];
if (!flags.trace) {
  for (const context of numbers(flags.context)) {
    for (const batch of batches) {
      const prompts = () => Array.from({ length: batch }, () => letters(context - 12));
      const first = [];
      const decode = [];
      const walls = [];
      const from = realtime();
      for (let repeat = 0; repeat < Number(flags.repeats); repeat += 1) {
        const begin = performance.now();
        const { firstMs, stepMs } = await timed(
          prompts(),
          newTokens + prefillSteps(context, batch),
        );
        walls.push(performance.now() - begin);
        first.push(firstMs);
        decode.push(stepMs);
      }
      windows.push({ context, batch, from, to: realtime() });
      const run = {
        context,
        batch,
        stepMs: round(median(decode), 4),
        tokensPerSecond: round((batch * 1000) / median(decode), 1),
        firstTokenMs: first.map((ms) => round(ms)),
        wallMs: walls.map((ms) => round(ms)),
      };
      report.runs.push(run);
      console.log(JSON.stringify(run));
    }
  }
}
if (flags.picture && !flags.trace) {
  const message = [
    {
      role: 'user',
      content: [
        { type: 'image', image: picture(1792, 1344) },
        { type: 'text', text: letters(64) },
      ],
    },
  ];
  report.picture = [];
  for (let repeat = 0; repeat < 4; repeat += 1) {
    const { timings, inputTokenLen } = await pipe(message, {
      maxNewTokens: newTokens,
      ignoreEos: true,
    });
    report.picture.push({ inputTokenLen, ...timings });
    console.log(JSON.stringify(report.picture.at(-1)));
  }
}
if (flags.trace) {
  const settings = { maxNewTokens: 33, ignoreEos: true, logprobs: 64 };
  const image = picture(448, 448);
  const cases = [1, 7, 63, 200, 517].map((length) => ({
    name: `text ${length}`,
    prompt: letters(length),
  }));
  if (flags.picture) {
    const pixels = `${flags.trace}.pixels`;
    writeFileSync(pixels, image.data);
    const content = [
      { type: 'image', image },
      { type: 'text', text: 'What is it?' },
    ];
    cases.push({ name: 'one tile', prompt: [{ role: 'user', content }], pixels });
  }
  const together = await pipe(
    cases.map(({ prompt }) => prompt),
    settings,
  );
  const requests = [];
  let sameAlone = 0;
  for (const [i, { name, prompt, pixels }] of cases.entries()) {
    const alone = await pipe(prompt, settings);
    sameAlone += JSON.stringify(alone.logprobs) === JSON.stringify(together[i].logprobs) ? 1 : 0;
    const { tokenIds, logprobs } = together[i];
    const promptIds = [...(await pipe.promptIds(prompt))];
    const topLogprobs = logprobs.map((step) => step.topLogprobs);
    requests.push({ name, promptIds, tokenIds, topLogprobs, ...(pixels ? { pixels } : {}) });
  }
  writeFileSync(flags.trace, JSON.stringify({ requests }));
  console.log(
    `trace: ${requests.length} requests, ${sameAlone} bitwise the same alone and together`,
  );
}
await pipe.close();
if (flags.windows)
  writeFileSync(flags.windows, JSON.stringify({ pid: process.pid, runs: windows }));
if (flags.out) writeFileSync(flags.out, `${JSON.stringify(report, null, 1)}\n`);
