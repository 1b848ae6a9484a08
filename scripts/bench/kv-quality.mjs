// `node scripts/bench/kv-quality.mjs`: the golden cases of the embedded model, greedy on the CPU,
// with the KV cache unquantised and of 8 and 4 bits. Prints, as JSON, how many answers equal the
// float32 reference's to the last token, and how far the others agree with it from their start.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { pipeline } from '../../dist/index.js';
import { root } from '../lib.mjs';

const MIB = 2 ** 20;
const folder = join(root, 'test', 'fixtures', 'tiny-internvl');
const { items } = JSON.parse(readFileSync(join(folder, 'golden.json'), 'utf8'));

const report = [];
for (const quantPolicy of [0, 8, 4]) {
  const pipe = await pipeline({ device: 'cpu', quantPolicy, kvCacheBytes: 64 * MIB });
  const responses = await pipe(items.map(toMessages), { maxNewTokens: 64 });
  const wanted = items.map((item) => item.awq.output_ids);
  const same = responses.map(({ tokenIds }, i) => commonStart(tokenIds, wanted[i]));
  const tokens = wanted.reduce((sum, ids) => sum + ids.length, 0);
  const { kvBlockBytes, kvBlockTokens } = pipe.memory();
  report.push({
    quantPolicy,
    cases: items.length,
    equalIds: responses.filter(({ tokenIds }, i) => equal(tokenIds, wanted[i])).length,
    tokensUntilFirstDifference: same.reduce((sum, count) => sum + count, 0),
    tokens,
    bytesPerToken: kvBlockBytes / kvBlockTokens,
  });
  await pipe.close();
}
console.log(JSON.stringify(report, null, 1));

function toMessages({ messages, images }) {
  const files = [...images];
  return messages.map(({ role, content }) => ({
    role,
    content: content.map(({ type, text = '' }) =>
      type === 'text' ? { type, text } : { type, image: join(folder, files.shift()) },
    ),
  }));
}

function commonStart(a, b) {
  const until = a.findIndex((id, i) => id !== b[i]);
  return until < 0 ? Math.min(a.length, b.length) : until;
}

function equal(a, b) {
  return a.length === b.length && commonStart(a, b) === a.length;
}
