// One process of turbomind-node on the AWQ model; prints one JSON line.
//   node run-ours.mjs MODEL_FOLDER --threads 2
import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { pipeline } from '../../dist/index.js';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    threads: { type: 'string', default: '2' },
    prompt: { type: 'string', default: '512' },
    tokens: { type: 'string', default: '128' },
  },
});
const promptLength = Number(values.prompt);
const count = Number(values.tokens);
const pipe = await pipeline(positionals[0], {
  device: 'cpu',
  threads: Number(values.threads),
  sessionLen: 2048,
  maxBatchSize: 16,
  // Random weights soon repeat themselves, which real text does not: one token a step, as the peer.
  speculativeConfig: { method: 'none' },
});
const loadMs = performance.now();
const stats = pipe.stats();

/** A text of about `length` tokens (the true count is reported), different for every salt. */
function text(length, salt) {
  const words = Array.from({ length }, (_, i) => `${(i * 7919 + salt * 104_729) % 9973}`).join(' ');
  return pipe.decode(pipe.tokenizer.encode(words).slice(0, length));
}
const options = { maxNewTokens: count, ignoreEos: true };
const one = async (prompt) => {
  const r = await pipe(prompt, options);
  if (r.generateTokenLen !== count)
    throw new Error(`generated ${r.generateTokenLen} of ${count} tokens`);
  return {
    prefill: r.inputTokenLen / (r.timings.prefillMs / 1e3),
    decode1: (r.generateTokenLen - 1) / (r.timings.decodeMs / 1e3),
    firstTokenMs: r.timings.firstTokenMs,
    preprocessMs: r.timings.preprocessMs,
    inputTokens: r.inputTokenLen,
  };
};
const together = async (n) => {
  const done = await pipe(
    Array.from({ length: n }, (_, i) => text(32, i + 10)),
    options,
  );
  const decodeMs = Math.max(...done.map((r) => r.timings.decodeMs));
  return done.reduce((a, r) => a + r.generateTokenLen - 1, 0) / (decodeMs / 1e3);
};
const prompts = [text(promptLength, 0), text(promptLength, 1)];
const first = await one(prompts[0]);
const steady = await one(prompts[1]);
const decode4 = await together(4);
const peak = () =>
  Number(/VmHWM:\s+(\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))?.[1]) / 1024;
const peakRssMiB = peak(); // as the peer's process: one and four sequences
const decode16 = await together(16);
await pipe.close();
console.log(
  JSON.stringify({
    engine: 'turbomind-node',
    loadMs,
    first,
    steady,
    decode4,
    decode16,
    peakRssMiB,
    weightBytes: stats.weightBytes,
    kvCacheBytes: stats.kvCacheBytes,
    device: stats.deviceDescription,
  }),
);
