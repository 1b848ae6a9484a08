// `npm run test:gpu`: the product on a GPU, through its public API and with no test framework, so that
// it also runs from the bundle on hosts without npm. Writes OUT/test-gpu.json; exits 1 if a check fails.
// Without a usable GPU it prints SKIP and exits 0.
//   node scripts/gpu/test-gpu.mjs [--out DIR] [--device cuda] [--bf16 FOLDER]
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
const { values: flags } = parseArgs({
  options: {
    out: { type: 'string', default: join(root, 'build', 'gpu-results') },
    device: { type: 'string', default: 'cuda' },
    bf16: { type: 'string' },
  },
});
const { pipeline } = await import(pathToFileURL(join(root, 'dist', 'index.js')));
const { probeCuda } = await import(pathToFileURL(join(root, 'dist', 'device.js')));
const fixtures = join(root, 'test', 'fixtures', 'tiny-internvl');
const AWQ = join(root, 'models', 'tiny-internvl');
// bf16 activations keep 8 bits; logits of tiny-internvl reach 20. A token may differ from the float32
// reference's only where the two best are this close.
const LOGIT_TOLERANCE = 0.25;
const NEAR_TIE = 0.15;

const found = await probeCuda();
const wanted = flags.device.startsWith('cuda');
if (wanted && !found.devices.some((_, i) => found.reason === '' && !found.problems[i])) {
  console.log(`SKIP: ${[found.reason, ...found.problems].filter(Boolean).join('; ') || 'no GPU'}`);
  process.exit(0);
}

const report = { gpu: found.devices, checks: [] };
let failed = 0;
async function check(name, body) {
  const begin = performance.now();
  let result;
  try {
    result = { ok: true, ...(await body()) };
  } catch (error) {
    result = { ok: false, error: error?.stack ?? String(error) };
  }
  failed += result.ok ? 0 : 1;
  report.checks.push({ name, seconds: (performance.now() - begin) / 1000, ...result });
  const { ok, ...rest } = result;
  console.log(`${ok ? 'ok  ' : 'FAIL'} ${name} ${JSON.stringify(rest).slice(0, 900)}`);
}
function must(condition, message) {
  if (!condition) throw new Error(message);
}
const open = (folder, options = {}) => pipeline(folder, { device: flags.device, ...options });

const golden = JSON.parse(readFileSync(join(fixtures, 'golden.json'), 'utf8')).items;
function toMessages({ messages, images }) {
  const files = [...images];
  return messages.map(({ role, content }) => ({
    role,
    content: content.map(({ type, text = '' }) =>
      type === 'text' ? { type, text } : { type, image: join(fixtures, files.shift()) },
    ),
  }));
}

// Where our tokens leave the reference's: undefined, or the step and the gap of our two best there.
function divergence(response, wantedIds) {
  const step = response.tokenIds.findIndex((id, i) => id !== wantedIds[i]);
  if (step < 0 && response.tokenIds.length === wantedIds.length) return undefined;
  const at = step < 0 ? response.tokenIds.length - 1 : step;
  const top = response.logprobs[at].topLogprobs;
  const best = top[0][1];
  const theirs = top.find(([id]) => id === wantedIds[at]);
  return { step: at, gap: theirs === undefined ? Infinity : best - theirs[1] };
}

async function goldenParity(folder, variant) {
  const pipe = await open(folder);
  try {
    let logitError = 0;
    let same = 0;
    const nearTies = [];
    for (const item of golden) {
      const messages = toMessages(item);
      const ids = await pipe.promptIds(messages);
      must(
        ids.length === item.input_ids.length && ids.every((id, i) => id === item.input_ids[i]),
        `${item.id}: other prompt ids`,
      );
      const logits = await pipe.promptLogits(messages);
      for (const { id, logit } of item[variant].first_top5) {
        logitError = Math.max(logitError, Math.abs(logits[id] - logit));
      }
    }
    const settings = { maxNewTokens: 64, logprobs: 5 };
    const alone = [];
    for (const item of golden) alone.push(await pipe(toMessages(item), settings));
    const together = await pipe(golden.map(toMessages), settings);
    golden.forEach((item, i) => {
      const left = divergence(alone[i], item[variant].output_ids);
      if (left === undefined) same += 1;
      else nearTies.push({ id: item.id, ...left });
      mustMatch(alone[i], together[i], item.id);
    });
    const worst = Math.max(0, ...nearTies.map(({ gap }) => gap));
    const numbers = { cases: golden.length, same, logitError, nearTies };
    must(logitError < LOGIT_TOLERANCE, `logits are off: ${JSON.stringify(numbers)}`);
    must(worst < NEAR_TIE, `other tokens: ${JSON.stringify(numbers)}`);
    return { ...numbers, device: pipe.stats().deviceName };
  } finally {
    await pipe.close();
  }
}

function mustMatch(a, b, name) {
  must(JSON.stringify(a.tokenIds) === JSON.stringify(b.tokenIds), `${name}: other tokens`);
  must(JSON.stringify(a.logprobs) === JSON.stringify(b.logprobs), `${name}: other logprobs`);
}

await check('golden parity, tiny-internvl AWQ, alone and in one batch', () =>
  goldenParity(AWQ, 'awq'),
);
if (flags.bf16 && existsSync(join(flags.bf16, 'config.json'))) {
  await check('golden parity, tiny-internvl bf16, alone and in one batch', () =>
    goldenParity(flags.bf16, 'bf16'),
  );
}

// Prompts of many lengths, among them those that leave one token for a last chunk.
const CHUNK = 96;
async function batchInvariance() {
  const pipe = await open(AWQ, { maxPrefillTokenNum: CHUNK, maxBatchSize: 64 });
  try {
    const text = 'The quick brown fox jumps over the lazy dog. '.repeat(20);
    const prompts = Array.from({ length: 48 }, (_, i) => text.slice(i, i + 1 + i * 17));
    const lengths = [];
    for (const prompt of prompts) lengths.push((await pipe.promptIds(prompt)).length);
    // One prompt for which chunks of CHUNK leave exactly one token.
    const extra = CHUNK + 1 - (((lengths[47] % CHUNK) + CHUNK) % CHUNK);
    prompts[47] += 'x'.repeat(extra % CHUNK);
    const tail = (await pipe.promptIds(prompts[47])).length % CHUNK;
    must(tail === 1, `the last chunk has ${tail} tokens, not 1`);
    const batch = [...prompts, ...golden.slice(0, 16).map(toMessages)];
    const settings = { maxNewTokens: 48, ignoreEos: true, logprobs: 3 };
    const together = await pipe(batch, settings);
    const again = await pipe([...batch].reverse(), settings);
    for (let i = 0; i < batch.length; i += 1) {
      mustMatch(together[i], again[batch.length - 1 - i], `request ${i}, batch reversed`);
    }
    let compared = 0;
    for (let i = 0; i < batch.length; i += 3) {
      mustMatch(together[i], await pipe(batch[i], settings), `request ${i}, alone`);
      compared += 1;
    }
    mustMatch(together[47], await pipe(batch[47], settings), 'the one-token tail, alone');
    const whole = await open(AWQ, { maxPrefillTokenNum: 4096 });
    try {
      for (const i of [5, 46, 47, 50]) {
        mustMatch(together[i], await whole(batch[i], settings), `request ${i}, in one chunk`);
      }
    } finally {
      await whole.close();
    }
    return { batch: batch.length, alone: compared, preemptions: pipe.stats().preemptions };
  } finally {
    await pipe.close();
  }
}
await check('bitwise: alone, in a batch of 64 with mixed prefills, run to run', batchInvariance);

await check('the same sampled tokens for the same seed, alone and in a batch', async () => {
  const pipe = await open(AWQ);
  try {
    const settings = {
      maxNewTokens: 32,
      doSample: true,
      temperature: 0.9,
      topK: 40,
      randomSeed: 7,
    };
    const prompts = ['Tell me a story.', 'What is 3 + 4?', 'Name a colour.'];
    const together = await pipe(prompts, settings);
    for (const [i, prompt] of prompts.entries()) {
      mustMatch(together[i], await pipe(prompt, settings), prompt);
    }
    return {};
  } finally {
    await pipe.close();
  }
});

await check('first request against the tenth', async () => {
  const begin = performance.now();
  const pipe = await open(AWQ);
  const openMs = performance.now() - begin;
  try {
    const times = [];
    const message = toMessages(golden[0]);
    for (let i = 0; i < 10; i += 1) {
      const { timings } = await pipe(message, { maxNewTokens: 32, ignoreEos: true });
      times.push({
        firstTokenMs: timings.firstTokenMs,
        prefillMs: timings.prefillMs,
        visionMs: timings.visionMs,
        totalMs: timings.totalMs,
      });
    }
    const ratio = times[0].firstTokenMs / times[9].firstTokenMs;
    return { openMs, ratio, first: times[0], second: times[1], tenth: times[9] };
  } finally {
    await pipe.close();
  }
});

function usedMiB() {
  const query = ['--query-gpu=memory.used', '--format=csv,noheader,nounits'];
  return Number(execFileSync('nvidia-smi', query, { encoding: 'utf8' }).split('\n')[0]);
}
await check('close() gives back all GPU memory', async () => {
  await (await open(AWQ)).close();
  const before = usedMiB();
  const pipe = await open(AWQ);
  await pipe('Hello', { maxNewTokens: 4 });
  const during = usedMiB();
  await pipe.close();
  const after = usedMiB();
  must(during > before + 20, `nothing was taken: ${before} MiB, then ${during}`);
  must(after <= before, `${before} MiB before, ${after} MiB after close`);
  return { before, during, after };
});

async function refusal(options) {
  try {
    await (await open(AWQ, options)).close();
  } catch (error) {
    return { code: error.code, message: error.message };
  }
  throw new Error(`accepted: ${JSON.stringify(options)}`);
}
await check('errors are typed, say numbers, and leave other pipelines alone', async () => {
  const pipe = await open(AWQ);
  try {
    const wanted = (await pipe('Hello', { maxNewTokens: 16 })).tokenIds;
    const budget = await refusal({ cacheMaxEntryCount: 1e-6 });
    must(budget.code === 'ERR_TM_OUT_OF_MEMORY' && /MiB/.test(budget.message), budget.message);
    const absent = await refusal({ device: 'cuda:63' });
    must(absent.code === 'ERR_TM_UNSUPPORTED_DEVICE' && /63/.test(absent.message), absent.message);
    // Logits of 4096 rows and activations of a million rows: tens of GiB.
    const large = await refusal({
      maxPrefillTokenNum: 2 ** 20,
      maxBatchSize: 4096,
      cacheMaxEntryCount: 1e-5,
    });
    must(large.code === 'ERR_TM_OUT_OF_MEMORY', `${large.code} ${large.message}`);
    const after = (await pipe('Hello', { maxNewTokens: 16 })).tokenIds;
    must(JSON.stringify(after) === JSON.stringify(wanted), 'the other pipeline answers otherwise');
    return { budget, absent, large };
  } finally {
    await pipe.close();
  }
});

mkdirSync(flags.out, { recursive: true });
writeFileSync(join(flags.out, 'test-gpu.json'), `${JSON.stringify(report, null, 1)}\n`);
console.log(`${report.checks.length - failed} of ${report.checks.length} checks passed`);
process.exit(failed > 0 ? 1 : 0);
