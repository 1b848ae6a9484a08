// node scripts/bench/bench-speculation.mjs [MODEL]: decoding with and without speculation, on text that
// repeats itself and on text that does not, alone and eight at once. Also checks that both give the
// same tokens. Without MODEL the embedded one is used.
import { parseArgs } from 'node:util';
import { pipeline } from '../../dist/index.js';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    device: { type: 'string', default: 'cpu' },
    threads: { type: 'string', default: '0' },
    tokens: { type: 'string', default: '128' },
  },
});
const maxNewTokens = Number(values.tokens);
const words = (salt, count) =>
  Array.from({ length: count }, (_, i) => `${(i * 7919 + salt * 104_729) % 9973}`).join(' ');
const TEXTS = {
  'repeats itself': (i) => `Copy this list: ${Array(6).fill(words(i, 6)).join(', ')}`,
  'does not': (i) => `Write about ${words(i, 24)}`,
};
// High temperature keeps a small model from falling into loops of its own.
const OPTIONS = {
  'repeats itself': () => ({ maxNewTokens, ignoreEos: true }),
  'does not': (i) => ({
    maxNewTokens,
    ignoreEos: true,
    doSample: true,
    temperature: 1.5,
    topK: 0,
    randomSeed: i,
  }),
};

async function measure(method) {
  const pipe = await pipeline(positionals[0], {
    device: values.device,
    threads: Number(values.threads),
    sessionLen: 1024,
    speculativeConfig: { method },
  });
  const rows = [];
  for (const [name, text] of Object.entries(TEXTS)) {
    for (const batch of [1, 8]) {
      const prompts = Array.from({ length: batch }, (_, i) => text(i));
      const options = prompts.map((_, i) => OPTIONS[name](i));
      await pipe(prompts, options); // measured prices and pages settle
      const before = pipe.stats();
      const responses = await pipe(prompts, options);
      const after = pipe.stats();
      const decodeMs = Math.max(...responses.map((r) => r.timings.decodeMs));
      rows.push({
        name,
        batch,
        tokensPerSecond: (batch * (maxNewTokens - 1)) / (decodeMs / 1e3),
        steps: after.steps - before.steps,
        drafted: after.draftedTokens - before.draftedTokens,
        accepted: after.acceptedTokens - before.acceptedTokens,
        tokenIds: responses.map((r) => r.tokenIds),
      });
    }
  }
  await pipe.close();
  return rows;
}

const plain = await measure('none');
const drafted = await measure('ngram');
console.log('| text | batch | none tok/s | ngram tok/s | ratio | steps | drafts | right |');
console.log('| --- | --- | --- | --- | --- | --- | --- | --- |');
for (const [i, a] of plain.entries()) {
  const b = drafted[i];
  if (JSON.stringify(a.tokenIds) !== JSON.stringify(b.tokenIds))
    throw new Error(`${a.name}, batch ${a.batch}: speculation changed the tokens`);
  const ratio = (b.tokensPerSecond / a.tokensPerSecond).toFixed(2);
  console.log(
    `| ${a.name} | ${a.batch} | ${a.tokensPerSecond.toFixed(0)} | ${b.tokensPerSecond.toFixed(0)} | ${ratio} | ${a.steps} → ${b.steps} | ${b.drafted} | ${b.accepted} |`,
  );
}
