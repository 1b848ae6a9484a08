// `npm run bench:structured`: generations under the schemas of test/fixtures/json-schemas.json by
// random sampling on the embedded model, each judged by a checker that shares no code with the
// library. Schemas that allow answers of any length are left out here: a random sampler may never
// end them. Reports what failed, the cost of a token with and without a schema, and how long grammars
// and masks take, there and for a synthetic vocabulary of 151,646 tokens, as JSON; exits 1 when an
// answer is not valid. `--vocabulary-only` times that vocabulary and nothing else.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { pipeline } from '../../dist/index.js';
import { createTokenizer } from '../../dist/tokenizer.js';
import { root } from '../lib.mjs';
import { problemsOf } from './json-schema-checker.mjs';
import { measureMasks } from './mask-latency.mjs';
import { quantile, round } from './statistics.mjs';
import { makeTokenizer } from './tokenizer.mjs';

const { values } = parseArgs({
  options: {
    generations: { type: 'string', default: '50' },
    every: { type: 'string', default: '1' },
    seed: { type: 'string', default: '1' },
    'vocabulary-only': { type: 'boolean', default: false },
  },
});
const generations = Number(values.generations);
/** Twice the longest answer that was seen. */
const MAX_TOKENS = 1000;
/** Every so many schemas, as many free answers of the same lengths are timed. */
const FREE_EVERY = 4;
const url = join(root, 'test', 'fixtures', 'json-schemas.json');
const fixtures = JSON.parse(readFileSync(url, 'utf8'))
  .filter(({ hasLongAnswers }) => !hasLongAnswers)
  .filter((_, index) => index % Number(values.every) === 0);
const prompts = ['Hello!', 'What is 27 + 45?', 'Reverse the word cat.', 'Spell the word house.'];
const batch = Array.from({ length: generations }, (_, i) => prompts[i % prompts.length]);
const sampling = { doSample: true, temperature: 1, topK: 0 };

if (values['vocabulary-only']) {
  console.log(JSON.stringify(await measureLargeVocabulary(), undefined, 1));
  process.exit(0);
}
const pipe = await pipeline({ device: 'cpu' });
const failures = [];
const firstUse = [];
const lengths = [];
const compared = { tokens: 0, guidedMs: 0, freeMs: 0 };
for (const [place, { name, schema }] of fixtures.entries()) {
  const responseFormat = { type: 'json_schema', jsonSchema: { name, schema } };
  firstUse.push((await timed('Hello!', { ...sampling, responseFormat, maxNewTokens: 1 })).ms);
  const settings = batch.map((_, index) => ({
    ...sampling,
    responseFormat,
    maxNewTokens: MAX_TOKENS,
    randomSeed: Number(values.seed) * 1_000_000 + place * 1000 + index,
  }));
  const { ms, responses } = await timed(batch, settings);
  lengths.push(...responses.map(({ generateTokenLen }) => generateTokenLen));
  for (const [index, response] of responses.entries()) {
    const problems = judge(schema, response);
    const { finishReason, text } = response;
    if (problems.length > 0) failures.push({ name, index, finishReason, text, problems });
  }
  if (place % FREE_EVERY === 0) await compare(responses, ms);
  process.stderr.write(`${name}: ${round(ms / 1000)} s, ${failures.length} failures so far\n`);
}
await pipe.close();
const masks = await measureMasks(pipe.tokenizer, fixtures);
const largeVocabulary = await measureLargeVocabulary();
report();

/** Of the kind and size of Qwen's. */
function measureLargeVocabulary() {
  const tokenizer = createTokenizer({ ...makeTokenizer(), modelVocabSize: 151_936, eosIds: [] });
  return measureMasks(tokenizer, fixtures);
}

/** Free answers, each as long as its guided one. */
async function compare(responses, guidedMs) {
  const settings = responses.map(({ generateTokenLen }) => ({
    ...sampling,
    ignoreEos: true,
    maxNewTokens: generateTokenLen,
  }));
  const free = await timed(batch, settings);
  compared.tokens += sum(free.responses.map(({ generateTokenLen }) => generateTokenLen));
  compared.guidedMs += guidedMs;
  compared.freeMs += free.ms;
}

async function timed(input, options) {
  const started = performance.now();
  const responses = await pipe(input, options);
  return { ms: performance.now() - started, responses };
}

function judge(schema, { text, finishReason, error }) {
  if (finishReason !== 'stop') return [`ended by ${finishReason} ${error?.message ?? ''}`];
  try {
    return problemsOf(schema, JSON.parse(text));
  } catch (error) {
    return [error.message];
  }
}

function report() {
  const guided = compared.guidedMs / compared.tokens;
  const free = compared.freeMs / compared.tokens;
  const result = {
    schemas: fixtures.length,
    generations: lengths.length,
    valid: lengths.length - failures.length,
    tokens: { all: sum(lengths), longest: Math.max(...lengths) },
    msPerToken: { guided: round(guided), free: round(free), overhead: round(guided - free) },
    firstUseMs: { p50: round(quantile(firstUse, 0.5)), max: round(Math.max(...firstUse)) },
    masks,
    largeVocabulary,
    failures: failures.slice(0, 20),
  };
  console.log(JSON.stringify(result, undefined, 1));
  process.exitCode = failures.length === 0 ? 0 : 1;
}

function sum(list) {
  return list.reduce((total, each) => total + each, 0);
}
