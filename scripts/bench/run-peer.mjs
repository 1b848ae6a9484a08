// One process of the peer, node-llama-cpp, on the GGUF model; prints one JSON line.
//   node run-peer.mjs MODEL.gguf --from FOLDER_WITH_NODE_MODULES --threads 2
// It is installed in a scratch folder (npm i node-llama-cpp@3.22.1) and never a dependency.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    from: { type: 'string' },
    threads: { type: 'string', default: '2' },
    prompt: { type: 'string', default: '512' },
    tokens: { type: 'string', default: '128' },
    sequences: { type: 'string', default: '4' },
  },
});
const threads = Number(values.threads);
const promptLength = Number(values.prompt);
const count = Number(values.tokens);
const sequences = Number(values.sequences);
const entry = createRequire(join(values.from, 'package.json')).resolve('node-llama-cpp');
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry).href);
const llama = await getLlama({
  gpu: false,
  build: 'never',
  logLevel: LlamaLogLevel.error,
  maxThreads: threads,
});
const model = await llama.loadModel({ modelPath: positionals[0] });
const context = await model.createContext({
  contextSize: 1024,
  sequences,
  threads,
  batchSize: 512,
});
const loadMs = performance.now();

/** Prefill, then `count` greedy tokens; times of the first token and of the rest. */
async function generate(sequence, length, salt) {
  const ids = Array.from({ length }, (_, i) => 1000 + ((i * 7919 + salt * 104_729) % 100_000));
  const start = performance.now();
  let first = 0;
  let n = 0;
  for await (const _ of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
    if (n === 0) first = performance.now();
    if (++n === count) break;
  }
  return { prefillMs: first - start, decodeMs: performance.now() - first, tokens: n - 1 };
}
const rows = [];
const all = Array.from({ length: sequences }, () => context.getSequence());
const [sequence] = all;
// --sequences 4 (the default) measures load, memory, prefill and decode; a process with more
// sequences only measures them together, since their context costs memory.
for (let rep = 0; rep < 2; rep++) {
  await sequence.clearHistory();
  const one = await generate(sequence, promptLength, rep);
  rows.push({
    prefill: promptLength / (one.prefillMs / 1e3),
    decode1: one.tokens / (one.decodeMs / 1e3),
    firstTokenMs: one.prefillMs,
  });
}
async function together(n) {
  for (const s of all) await s.clearHistory();
  const done = await Promise.all(all.slice(0, n).map((s, i) => generate(s, 32, i + 10)));
  const decodeMs = Math.max(...done.map((d) => d.decodeMs));
  return done.reduce((a, d) => a + d.tokens, 0) / (decodeMs / 1e3);
}
const decodeTogether = await together(sequences);
const status = readFileSync('/proc/self/status', 'utf8');
const peakRssMiB = Number(/VmHWM:\s+(\d+)/.exec(status)?.[1]) / 1024;
console.log(
  JSON.stringify({
    engine: 'node-llama-cpp',
    loadMs,
    first: rows[0],
    steady: rows[1],
    sequences,
    decodeTogether,
    peakRssMiB,
  }),
);
process.exit(0);
