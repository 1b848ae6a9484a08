// `npm run bench:structured`: generations under every schema of test/fixtures/json-schemas.json by
// random sampling on the embedded model, each judged by a checker that shares no code with the
// library. Reports the failures and the cost of a token with and without a schema, as JSON.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { pipeline } from '../../dist/index.js';
import { root } from '../lib.mjs';
import { problemsOf } from './json-schema-checker.mjs';

const { values } = parseArgs({
  options: {
    generations: { type: 'string', default: '50' },
    every: { type: 'string', default: '1' },
    seed: { type: 'string', default: '1' },
  },
});
const generations = Number(values.generations);
const url = join(root, 'test', 'fixtures', 'json-schemas.json');
const fixtures = JSON.parse(readFileSync(url, 'utf8')).filter(
  (_, i) => i % Number(values.every) === 0,
);
const prompts = ['Hello!', 'What is 27 + 45?', 'Reverse the word cat.', 'Spell the word house.'];

const pipe = await pipeline({ device: 'cpu' });
const failures = [];
const openMs = [];
let valid = 0;
let tokens = 0;
let guidedMs = 0;
for (const [place, { name, schema }] of fixtures.entries()) {
  const responseFormat = { type: 'json_schema', jsonSchema: { name, schema } };
  const options = { doSample: true, temperature: 1, topK: 0, maxNewTokens: null, responseFormat };
  const first = performance.now();
  await pipe('Hello!', { ...options, maxNewTokens: 1 });
  openMs.push(performance.now() - first);
  const started = performance.now();
  const batch = Array.from({ length: generations }, (_, i) => prompts[i % prompts.length]);
  const settings = batch.map((_, i) => ({
    ...options,
    randomSeed: Number(values.seed) * 1_000_000 + place * 1000 + i,
  }));
  const responses = await pipe(batch, settings);
  guidedMs += performance.now() - started;
  for (const [index, response] of responses.entries()) {
    tokens += response.generateTokenLen;
    const problems = judge(schema, response);
    if (problems.length === 0) valid += 1;
    else
      failures.push({
        name,
        index,
        finishReason: response.finishReason,
        text: response.text,
        problems,
      });
  }
}
const freeMs = await measureFree();
const guidedTokenMs = guidedMs / tokens;
console.log(
  JSON.stringify(
    {
      schemas: fixtures.length,
      generations: fixtures.length * generations,
      valid,
      tokens,
      guidedMsPerToken: round(guidedTokenMs),
      freeMsPerToken: round(freeMs),
      overheadMsPerToken: round(guidedTokenMs - freeMs),
      firstUseMs: { median: round(quantile(openMs, 0.5)), max: round(Math.max(...openMs)) },
      failures: failures.slice(0, 20),
    },
    undefined,
    1,
  ),
);
await pipe.close();
process.exitCode = failures.length === 0 ? 0 : 1;

function judge(schema, { text, finishReason, error }) {
  if (finishReason !== 'stop') return [`ended by ${finishReason} ${error?.message ?? ''}`];
  try {
    return problemsOf(schema, JSON.parse(text));
  } catch (error) {
    return [error.message];
  }
}

// As many answers at a time, free, of the same mean length.
async function measureFree() {
  const length = Math.max(1, Math.round(tokens / (fixtures.length * generations)));
  const batch = Array.from({ length: generations }, (_, i) => prompts[i % prompts.length]);
  const options = {
    doSample: true,
    temperature: 1,
    topK: 0,
    ignoreEos: true,
    maxNewTokens: length,
  };
  const started = performance.now();
  let count = 0;
  for (let round = 0; round < 4; round += 1) {
    for (const { generateTokenLen } of await pipe(batch, options)) count += generateTokenLen;
  }
  return (performance.now() - started) / count;
}

function quantile(list, share) {
  const sorted = [...list].sort((a, b) => a - b);
  return sorted[Math.floor((sorted.length - 1) * share)];
}

function round(number) {
  return Math.round(number * 1000) / 1000;
}
