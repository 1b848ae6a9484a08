// What a schema costs a token end to end with a vocabulary of 151,936 tokens: a folder of make-model.mjs
// (Qwen2.5-0.5B's shape, random weights), answers under a schema and free ones of the same lengths in
// turn, each grammar used once before. Prints JSON; CPU time is that of all threads of this process and is
// what a busy machine distorts least.
//   node scripts/bench/structured-model.mjs FOLDER [--rounds 3] [--tokens 32] [--batch 1,4]
import { readFileSync } from 'node:fs';
import { loadavg } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { pipeline } from '../../dist/index.js';
import { root } from '../lib.mjs';
import { quantile, round } from './statistics.mjs';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    rounds: { type: 'string', default: '3' },
    tokens: { type: 'string', default: '32' },
    batch: { type: 'string', default: '1,4' },
    schemas: { type: 'string', default: '3' },
  },
});
const folder = positionals[0];
if (!folder) throw new Error('usage: structured-model.mjs FOLDER; see the head of this file');
const url = join(root, 'test', 'fixtures', 'json-schemas.json');
const fixtures = JSON.parse(readFileSync(url, 'utf8')).filter(
  ({ hasLongAnswers }) => !hasLongAnswers,
);
const schemas = fixtures.slice(0, Number(values.schemas));
const pipe = await pipeline(folder, {
  device: 'cpu',
  sessionLen: 512,
  maxBatchSize: 8,
  kvCacheBytes: 2e8,
});

async function timed(batch, settings) {
  const cpu = process.cpuUsage();
  const begin = performance.now();
  const responses = await pipe(
    Array.from({ length: batch }, () => 'Hello!'),
    settings,
  );
  const wall = performance.now() - begin;
  const { user, system } = process.cpuUsage(cpu);
  const failed = responses.find(({ error }) => error !== undefined);
  if (failed) throw failed.error;
  return { responses, wall, cpu: (user + system) / 1000 };
}

const report = { load: round(loadavg()[0]), rows: [] };
const sampling = { doSample: true, temperature: 1, topK: 0, ignoreEos: false };
for (const batch of values.batch.split(',').map(Number)) {
  const kinds = { guided: { wall: [], cpu: [] }, free: { wall: [], cpu: [] } };
  let tokens = 0;
  for (const { name, schema } of schemas) {
    const responseFormat = { type: 'json_schema', jsonSchema: { name, schema } };
    await timed(1, { ...sampling, responseFormat, maxNewTokens: 1 });
    for (let i = 0; i < Number(values.rounds); i += 1) {
      const seeds = Array.from({ length: batch }, (_, index) => ({
        ...sampling,
        randomSeed: 1000 * i + index,
      }));
      const guided = await timed(
        batch,
        seeds.map((each) => ({ ...each, responseFormat, maxNewTokens: Number(values.tokens) })),
      );
      const lengths = guided.responses.map(({ generateTokenLen }) => generateTokenLen);
      const free = await timed(
        batch,
        seeds.map((each, index) => ({ ...each, ignoreEos: true, maxNewTokens: lengths[index] })),
      );
      const count = lengths.reduce((sum, length) => sum + length, 0);
      tokens += count;
      for (const [kind, { wall, cpu }] of Object.entries({ guided, free })) {
        kinds[kind].wall.push(wall / Math.max(...lengths));
        kinds[kind].cpu.push(cpu / count);
      }
    }
  }
  const middle = (list) => round(quantile(list, 0.5));
  report.rows.push({
    batch,
    tokens,
    stepMs: { guided: middle(kinds.guided.wall), free: middle(kinds.free.wall) },
    cpuMsPerToken: { guided: middle(kinds.guided.cpu), free: middle(kinds.free.cpu) },
  });
}
await pipe.close();
console.log(JSON.stringify(report, undefined, 1));
