// `npm run test:gpu`: the product on a GPU, through its public API and with no test framework, so that
// it also runs from the bundle on hosts without npm. Writes OUT/test-gpu.json; exits 1 if a check fails.
// Without a usable GPU it prints SKIP and exits 0. Memory is compared with what the driver counts on the whole GPU:
// nothing else may run on it.
//   node scripts/gpu/test-gpu.mjs [--out DIR] [--device cuda] [--bf16 FOLDER] [--only TEXT]
// --only: the checks with TEXT in their name (under compute-sanitizer all of them take hours).
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import { usableGpu } from './usable-gpu.mjs';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
const { values: flags } = parseArgs({
  options: {
    out: { type: 'string', default: join(root, 'build', 'gpu-results') },
    device: { type: 'string', default: 'cuda' },
    bf16: { type: 'string' },
    only: { type: 'string', default: '' },
  },
});
const { estimate, pipeline } = await import(pathToFileURL(join(root, 'dist', 'index.js')));
const { nativeOptions } = await import(pathToFileURL(join(root, 'dist', 'native-options.js')));
const { resolvePipelineOptions } = await import(pathToFileURL(join(root, 'dist', 'options.js')));
const { loadNative } = await import(pathToFileURL(join(root, 'dist', 'native.js')));
const { GREEDY } = await import(pathToFileURL(join(root, 'dist', 'prompt-job.js')));
const fixtures = join(root, 'test', 'fixtures', 'tiny-internvl');
const AWQ = join(root, 'models', 'tiny-internvl');
// Greedy ids against the float32 reference's. float16 activations keep 11 bits: every one must agree.
// bfloat16 keeps 8: its logits, which reach 20, are off by up to 0.14, so two tokens whose scores in the
// reference lie closer than twice that may change places. That is the largest gap at which a token may
// differ; 0.008 is the largest seen.
const ACCURACY = {
  float16: { logits: 0.03, gap: -Infinity },
  bfloat16: { logits: 0.25, gap: 0.28 },
};

const found = await usableGpu(flags.device);

const report = { gpu: found.devices, checks: [] };
let failed = 0;
async function check(name, body) {
  if (!name.includes(flags.only)) return;
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
// Each golden file names its weights by their SHA-256: the embedded model's, or an older model's.
function goldenOf(folder, variant) {
  const weights = readFileSync(join(folder, 'model.safetensors'));
  const digest = createHash('sha256').update(weights).digest('hex');
  for (const name of ['golden.json', 'golden-first.json']) {
    const file = JSON.parse(readFileSync(join(fixtures, name), 'utf8'));
    if (file.weights[variant] === digest) return file.items;
  }
  throw new Error(`no golden file speaks of the ${variant} weights in ${folder}`);
}
function toMessages({ messages, images }) {
  const files = [...images];
  return messages.map(({ role, content }) => ({
    role,
    content: content.map(({ type, text = '' }) =>
      type === 'text' ? { type, text } : { type, image: join(fixtures, files.shift()) },
    ),
  }));
}

// Where our tokens leave the reference's: undefined, or the step and how far apart the reference holds
// the two tokens. `exact` answers as the reference does, with its scores.
async function divergence(exact, item, response, wantedIds) {
  const step = response.tokenIds.findIndex((id, i) => id !== wantedIds[i]);
  if (step < 0 && response.tokenIds.length === wantedIds.length) return undefined;
  const at = step < 0 ? response.tokenIds.length : step;
  const reference = await exact(toMessages(item), { maxNewTokens: 64, logprobs: 50 });
  const scores = new Map(reference.logprobs[at]?.topLogprobs);
  const ours = scores.get(response.tokenIds[at]);
  const theirs = scores.get(wantedIds[at]);
  const known = ours !== undefined && theirs !== undefined;
  return { step: at, gap: known ? theirs - ours : Infinity };
}

async function goldenParity(folder, variant, dtype) {
  const golden = goldenOf(folder, variant);
  const pipe = await open(folder, { dtype });
  const allowed = ACCURACY[dtype];
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
    // The CPU backend: all of these cases give the reference's tokens there.
    const exact = await pipeline(folder, { device: 'cpu' });
    for (const [i, item] of golden.entries()) {
      const left = await divergence(exact, item, alone[i], item[variant].output_ids);
      if (left === undefined) same += 1;
      else nearTies.push({ id: item.id, ...left });
      mustMatch(alone[i], together[i], item.id);
    }
    await exact.close();
    const worst = Math.max(-Infinity, ...nearTies.map(({ gap }) => gap));
    const numbers = { cases: golden.length, same, logitError, nearTies };
    must(logitError < allowed.logits, `logits are off: ${JSON.stringify(numbers)}`);
    must(worst <= allowed.gap, `other tokens: ${JSON.stringify(numbers)}`);
    return { ...numbers, device: pipe.stats().deviceName };
  } finally {
    await pipe.close();
  }
}

function mustMatch(a, b, name) {
  must(JSON.stringify(a.tokenIds) === JSON.stringify(b.tokenIds), `${name}: other tokens`);
  must(JSON.stringify(a.logprobs) === JSON.stringify(b.logprobs), `${name}: other logprobs`);
}

for (const dtype of ['float16', 'bfloat16']) {
  await check(`golden parity, tiny-internvl AWQ, ${dtype}, alone and in one batch`, () =>
    goldenParity(AWQ, 'awq', dtype),
  );
  if (flags.bf16 && existsSync(join(flags.bf16, 'config.json'))) {
    await check(`golden parity, tiny-internvl bf16, ${dtype}, alone and in one batch`, () =>
      goldenParity(flags.bf16, 'bf16', dtype),
    );
  }
}

// The fixture models hold corners of the formats at sizes that no real model has: heads of 16 and 32,
// which the GPU's attention refuses. Either the float64 network's logits come out, or that refusal.
const GPU_HEADS = [64, 80, 96, 128];
const SMALL = { maxBatchSize: 4, maxPrefillTokenNum: 64, cacheMaxEntryCount: 0.01 };
async function runFixture(name, dtype) {
  const folder = join(root, 'test', 'fixtures', 'models', name);
  const read = (file) => JSON.parse(readFileSync(join(folder, file), 'utf8'));
  const { spec, files, tensors } = read('native.json');
  const { addon } = loadNative();
  const engine = await addon.open(
    nativeOptions(
      { spec, tensors, files: files.map((file) => join(folder, file)) },
      resolvePipelineOptions({ dtype, ...SMALL }),
      { device: flags.device === 'cuda' ? 'cuda:0' : flags.device, cudaLibrary: found.library },
    ),
    () => undefined,
    () => undefined,
  );
  try {
    let error = 0;
    for (const { input_ids, tiles, logits } of read('expected.json').cases) {
      if (tiles > 0) continue;
      const request = {
        ...{ id: 1, promptTokens: Int32Array.from(input_ids), images: [], sampling: GREEDY },
        ...{ maxNewTokens: 1, minNewTokens: 0, stopTokenIds: [] },
      };
      const ours = await engine.promptLogits(request);
      error = Math.max(error, ...logits.map((wanted, i) => Math.abs(ours[i] - wanted)));
    }
    return error;
  } finally {
    await engine.close();
  }
}
await check('the fixture models, both dtypes', async () => {
  const results = {};
  const names = readdirSync(join(root, 'test', 'fixtures', 'models'));
  for (const name of names.filter((folder) => /^(qwen|internvl)/.test(folder))) {
    const native = join(root, 'test', 'fixtures', 'models', name, 'native.json');
    const { headDim } = JSON.parse(readFileSync(native, 'utf8')).spec.decoder;
    for (const dtype of ['float16', 'bfloat16']) {
      try {
        const error = await runFixture(name, dtype);
        must(GPU_HEADS.includes(headDim), `${name}: heads of ${headDim} were not refused`);
        // Random layers of gain 1.5 with logits of up to 22 amplify each rounding.
        must(error < (dtype === 'float16' ? 0.15 : 1.0), `${name}, ${dtype}: error ${error}`);
        results[`${name} ${dtype}`] = error;
      } catch (error) {
        if (GPU_HEADS.includes(headDim) || !/head_dim/.test(error.message)) throw error;
        results[`${name} ${dtype}`] = 'refused';
      }
    }
  }
  return { results };
});

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

// A pool that holds a fraction of what runs: sequences are preempted to pinned host memory, or computed
// again, and answer as they do alone. Without sharing, so that nothing is found in the pool instead.
const PREEMPTED = { sessionLen: 1024, maxPrefillTokenNum: 256, enablePrefixCaching: false };
async function preempted(quantPolicy, swapSpaceBytes) {
  const { kvBlockBytes } = await estimate(AWQ, { device: flags.device, ...PREEMPTED, quantPolicy });
  const pool = { ...PREEMPTED, quantPolicy, kvCacheBytes: 24 * kvBlockBytes };
  const pipe = await open(AWQ, { ...pool, swapSpaceBytes: swapSpaceBytes * kvBlockBytes });
  try {
    const text = 'The quick brown fox jumps over the lazy dog. ';
    const prompts = Array.from({ length: 14 }, (_, i) => text.repeat(1 + (i % 9)).slice(i));
    const batch = [...prompts, ...golden.slice(0, 6).map(toMessages)];
    const settings = { maxNewTokens: 160, ignoreEos: true, logprobs: 3 };
    const together = await pipe(batch, settings);
    const { preemptions, swapsOut, swapsIn, swapBlocks, freeSwapBlocks } = pipe.stats();
    for (const [i, prompt] of batch.entries()) {
      mustMatch(together[i], await pipe(prompt, settings), `request ${i}, alone`);
    }
    const seen = { preemptions, swapsOut, swapsIn, swapBlocks };
    must(preemptions > 0, `nobody was preempted: ${JSON.stringify(seen)}`);
    must(freeSwapBlocks === swapBlocks, `${swapBlocks - freeSwapBlocks} slots are not back`);
    must(swapsIn > 0 === swapBlocks > 0, `no swap: ${JSON.stringify(seen)}`);
    mustHold(pipe.memory());
    return { quantPolicy, ...seen };
  } finally {
    await pipe.close();
  }
}

// The plan bounds what was really taken: each part of it, all together, and as the driver counts.
function mustHold(report) {
  const { use, reserveBytes: reserve } = report;
  const parts = [
    ['decoder', use.decoderBytes, report.weightBytes + report.activationBytes],
    ['vision', use.visionBytes, report.visionWeightBytes + report.visionActivationBytes],
    ['workspace', use.workspaceBytes, report.scratchBytes + report.samplingBytes],
    ['KV cache', use.kvCacheBytes, report.kvCacheBytes],
    ['image embeddings', use.imageEmbeddingBytes, report.imageEmbeddingBytes],
  ];
  for (const [name, taken, planned] of parts) {
    must(taken <= planned + reserve, `${name}: ${taken} bytes taken, ${planned} planned`);
  }
  const { allocatedBytes, totalBytes, freeBytes, deviceFreeBytes } = report;
  must(allocatedBytes <= totalBytes, `${allocatedBytes} bytes taken, ${totalBytes} planned`);
  // Others on the GPU may take memory meanwhile; nobody should in this test.
  const driver = freeBytes - deviceFreeBytes;
  must(driver <= totalBytes, `the driver counts ${driver} bytes, ${totalBytes} are planned`);
  return { totalBytes, allocatedBytes, driverBytes: driver, parts };
}
await check(
  'preempted to host memory and back, KV of 16, 8 and 4 bits: tokens as alone',
  async () => {
    const runs = [];
    for (const [quantPolicy, swapBlocks] of [
      [0, 256],
      [0, 0],
      [8, 256],
      [4, 256],
    ]) {
      runs.push(await preempted(quantPolicy, swapBlocks));
    }
    return { runs };
  },
);
await check('the memory plan holds, after loading and after work', async () => {
  const pipe = await open(AWQ, { maxBatchSize: 64, cacheMaxEntryCount: 0.05 });
  try {
    const loaded = mustHold(pipe.memory());
    const settings = { maxNewTokens: 48, ignoreEos: true };
    await pipe(golden.map(toMessages), settings);
    await pipe('Hello', { ...settings, doSample: true, logprobs: 5 });
    const worked = mustHold(pipe.memory());
    must(
      worked.allocatedBytes === loaded.allocatedBytes,
      `${worked.allocatedBytes - loaded.allocatedBytes} bytes were taken after loading`,
    );
    return { loaded, worked };
  } finally {
    await pipe.close();
  }
});

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
    const kinds = [
      settings,
      { ...settings, topK: 0, topP: 0.9, minP: 0.02 },
      { ...settings, topK: 0, temperature: 1.5, frequencyPenalty: 0.5, presencePenalty: 0.5 },
      { maxNewTokens: 32, repetitionPenalty: 1.3, logprobs: 5 },
    ];
    for (const kind of kinds) {
      const together = await pipe(prompts, kind);
      for (const [i, prompt] of prompts.entries()) {
        mustMatch(together[i], await pipe(prompt, kind), prompt);
      }
    }
    return { kinds: kinds.length };
  } finally {
    await pipe.close();
  }
});

await check(
  'drafts: the tokens of decoding one by one, greedy, sampled and penalised',
  async () => {
    const plain = await open(AWQ);
    const drafting = await open(AWQ, { speculativeConfig: { method: 'ngram' } });
    try {
      const prompts = ['one two three four, '.repeat(12), 'Count: 1 2 3 1 2 3 1 2 3 1 2', 'Hello.'];
      const settings = { maxNewTokens: 96, ignoreEos: true };
      const kinds = [
        settings,
        { ...settings, doSample: true, temperature: 0.7, topK: 20, randomSeed: 5, logprobs: 2 },
        { ...settings, repetitionPenalty: 1.05, frequencyPenalty: 0.1 },
      ];
      for (const kind of kinds) {
        const wanted = await plain(prompts, kind);
        const together = await drafting(prompts, kind);
        for (const [i, prompt] of prompts.entries()) {
          mustMatch(together[i], wanted[i], prompt);
          mustMatch(await drafting(prompt, kind), wanted[i], `${prompt}, alone`);
        }
      }
      const { draftedTokens, acceptedTokens } = drafting.stats();
      must(acceptedTokens > 0, `${acceptedTokens} of ${draftedTokens} drafts were accepted`);
      return { draftedTokens, acceptedTokens };
    } finally {
      await plain.close();
      await drafting.close();
    }
  },
);

// Each generation option on the GPU against the CPU backend, which has tests of its own for every one.
// float16 resolves the scores of these prompts, so the tokens must be the same ones.
const OPTIONS = {
  repetitionPenalty: { repetitionPenalty: 1.3 },
  'frequency and presence penalty': { frequencyPenalty: 0.6, presencePenalty: 0.4 },
  logitBias: { logitBias: { 101: 3, 97: -100, 116: 1.5 } },
  badWords: { badWords: ['the', 'is'] },
  stopWords: { stopWords: ['e '] },
  stopTokenIds: { stopTokenIds: [115] },
  minNewTokens: { minNewTokens: 30 },
  n: { n: 3, doSample: true, topK: 1, randomSeed: 3 },
  topLogprobs: { topLogprobs: 5 },
  logitsProcessor: {
    logitsProcessor: (_ids, logits) => {
      for (let id = 97; id < 110; id += 1) logits[id] -= 2;
    },
  },
  regex: { responseFormat: { type: 'regex_schema', regexSchema: '[a-z]{3,9} [0-9]{2}' } },
  choice: { responseFormat: { type: 'choice', choices: ['circle', 'square', 'triangle'] } },
  'json schema': {
    responseFormat: {
      type: 'json_schema',
      jsonSchema: {
        schema: {
          type: 'object',
          properties: { ok: { type: 'boolean' }, n: { type: 'integer', minimum: 0, maximum: 99 } },
          required: ['ok', 'n'],
        },
      },
    },
  },
};

function worstError(a, b, name) {
  must(a.length > 0 && a.length === b.length, `${name}: ${a.length} and ${b.length} values`);
  return a.reduce((worst, value, i) => Math.max(worst, Math.abs(value - b[i])), 0);
}

await check('generation options and scores as on the CPU, float16', async () => {
  const gpu = await open(AWQ, { dtype: 'float16' });
  const cpu = await pipeline(AWQ, { device: 'cpu' });
  try {
    const prompts = ['What is 27 + 45?', 'Name a colour.'];
    for (const [name, option] of Object.entries(OPTIONS)) {
      const settings = { maxNewTokens: 40, ...option };
      const [ours, exact] = [await gpu(prompts, settings), await cpu(prompts, settings)];
      const texts = (responses) => JSON.stringify(responses.flat().map(({ text }) => text));
      must(texts(ours) === texts(exact), `${name}: ${texts(ours)} for ${texts(exact)}`);
    }
    const all = { outputLogits: 'all', outputLastHiddenState: 'all', maxNewTokens: 12 };
    const [ours, exact] = [await gpu(prompts[0], all), await cpu(prompts[0], all)];
    const [ppl, exactPpl] = [await gpu.getPpl(prompts), await cpu.getPpl(prompts)];
    const [vectors, exactVectors] = [await gpu.embed(prompts), await cpu.embed(prompts)];
    const errors = {
      logits: worstError(ours.logits.data, exact.logits.data, 'logits'),
      hidden: worstError(ours.lastHiddenState.data, exact.lastHiddenState.data, 'hidden states'),
      ppl: worstError(ppl, exactPpl, 'getPpl'),
      embed: Math.max(...vectors.map((v, i) => worstError(v, exactVectors[i], 'embed'))),
    };
    // Logits reach 20, normed hidden states 10, unit vectors 1; float16 keeps 11 bits of each sum.
    const bounds = { logits: 0.05, hidden: 0.05, ppl: 0.01, embed: 0.002 };
    for (const [name, bound] of Object.entries(bounds)) {
      must(errors[name] <= bound, `${name}: off by ${errors[name]}, at most ${bound}`);
    }
    return { options: Object.keys(OPTIONS).length, errors };
  } finally {
    await gpu.close();
    await cpu.close();
  }
});

// A picture of its own for each `seed`: the tiles of one that was seen before are kept.
function aboutAPicture(seed) {
  const [width, height] = [896, 448];
  const data = Uint8Array.from(
    { length: 3 * width * height },
    (_, i) => (31 * i + 97 * seed) % 256,
  );
  const content = [
    { type: 'image', image: { data, width, height, channels: 3 } },
    { type: 'text', text: 'What do you see?' },
  ];
  return [{ role: 'user', content }];
}

await check('first request against the tenth', async () => {
  const begin = performance.now();
  // Without prefix sharing: the later requests must do the work of the first.
  const pipe = await open(AWQ, { enablePrefixCaching: false });
  const openMs = performance.now() - begin;
  try {
    const times = [];
    for (let i = 0; i < 10; i += 1) {
      const { timings } = await pipe(aboutAPicture(i), { maxNewTokens: 32, ignoreEos: true });
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
