// No option is accepted and ignored, and none is left out of docs/api.md: every one is set once, and
// what the engine is asked, what the caller gets or the refusal must differ.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { openCheckpoint } from '../../lib/checkpoint/checkpoint.js';
import { embeddedModel } from '../../lib/embedded-model.js';
import { packageRoot } from '../../lib/native.js';
import { openPipeline } from '../../lib/open-pipeline.js';
import { type GenerationOptions, OPTION_NAMES, type PipelineOptions } from '../../lib/options.js';
import { loadTokenizer, type Tokenizer } from '../../lib/tokenizer.js';
import { makeFakeAddon } from './support/fake-addon.js';

const PROMPT = { text: 'Hello!', images: [join(packageRoot(), 'examples', 'shapes.png')] };
const GIVEN_UP = AbortSignal.abort(new Error('given up'));
let tokenizer: Tokenizer;
let special: number;
const progress: number[] = [];

beforeAll(async () => {
  tokenizer = await loadTokenizer(await openCheckpoint(embeddedModel()));
  const ids = Array.from({ length: tokenizer.vocabSize }, (_, id) => id);
  special = ids.find((id) => tokenizer.isSpecial(id) && !tokenizer.eosIds.includes(id)) ?? -1;
  expect(special).toBeGreaterThan(0);
});

/** All that can be seen of one answer, as text; times, which never repeat, left out. */
async function seen(pipeline: PipelineOptions, generation: GenerationOptions): Promise<string> {
  const answer = [
    ...tokenizer.encode('ab'),
    special,
    ...tokenizer.encode('c'),
    ...tokenizer.eosIds,
  ];
  const addon = makeFakeAddon({ answer: () => answer });
  const noGpu = async () => {
    return { library: '', driver: false, devices: [], problems: [], reason: 'no GPU' };
  };
  progress.length = 0;
  let result: unknown;
  try {
    await using pipe = await openPipeline(
      embeddedModel(),
      { device: 'cpu', ...pipeline },
      addon,
      noGpu,
    );
    const [response] = await pipe([PROMPT], generation);
    result = response?.error === undefined ? response : { error: response.error.message };
  } catch (error) {
    result = { error: error instanceof Error ? error.message : error };
  }
  const { opened, tiled, engines } = addon;
  const asked = engines.map(({ submitted, edited }) => ({ submitted, edited }));
  return JSON.stringify({ opened, tiled, asked, progress, result }, (key, value: unknown) => {
    if (key === 'timings' || key === 'tensors') return undefined;
    return typeof value === 'bigint' ? String(value) : value;
  });
}

/** `value` for the option, beside `base`, which is what it is compared with. */
interface Sample<T, K extends keyof T> {
  readonly value: T[K];
  readonly base?: T;
}
type Samples<T> = { readonly [K in keyof T]-?: Sample<T, K> };

const PIPELINE: Samples<PipelineOptions> = {
  device: { value: 'cuda' },
  dtype: { value: 'float16' },
  threads: { value: 3 },
  sessionLen: { value: 2000 },
  maxBatchSize: { value: 4 },
  maxPrefillTokenNum: { value: 100 },
  cacheMaxEntryCount: { value: 0.4 },
  kvCacheBytes: { value: 2 ** 20 },
  memoryBudgetBytes: { value: 2 ** 28 },
  swapSpaceBytes: { value: 2 ** 26 },
  cacheBlockSeqLen: { value: 32 },
  enablePrefixCaching: { value: false },
  maxQueueSize: { value: 2 },
  maxInterTokenLatencyMs: { value: 9 },
  quantPolicy: { value: 8 },
  speculativeConfig: { value: { method: 'none' } },
  tp: { value: 2 },
  minDynamicPatch: { value: 3 },
  maxDynamicPatch: { value: 2 },
  useThumbnail: { value: false },
  maxImagePixels: { value: 100 },
  imageFetch: { value: { maxBytes: 10 } },
  tokenizer: {
    get value() {
      const encode = (text: string) => [...tokenizer.encode(text), 65];
      const own: Tokenizer = Object.create(tokenizer, { encode: { value: encode } });
      return own;
    },
  },
  chatTemplate: { value: '{% for m in messages %}{{ m.content }}{% endfor %}' },
  signal: { value: GIVEN_UP },
  onProgress: { value: (share) => progress.push(share) },
  cpuIsa: { value: 'avx2' },
};

const SAMPLED = { doSample: true, randomSeed: 1 } as const;

const GENERATION: Samples<GenerationOptions> = {
  maxNewTokens: { value: 2 },
  minNewTokens: { value: 2 },
  priority: { value: 3 },
  queueTimeoutMs: { value: 1000 },
  doSample: { value: true },
  temperature: { value: 0.5, base: SAMPLED },
  topK: { value: 3, base: SAMPLED },
  topP: { value: 0.5, base: SAMPLED },
  minP: { value: 0.1, base: SAMPLED },
  repetitionPenalty: { value: 1.2 },
  frequencyPenalty: { value: 0.5 },
  presencePenalty: { value: 0.5 },
  logitBias: { value: { 65: 3 } },
  randomSeed: { value: 2, base: SAMPLED },
  stopWords: { value: ['b'] },
  stopTokenIds: { value: [65] },
  badWords: { value: ['bad'] },
  // A refusal, so that no grammar worker is started here.
  responseFormat: { value: { type: 'choice', choices: [] } },
  ignoreEos: { value: true },
  skipSpecialTokens: { value: false },
  logprobs: { value: 2 },
  topLogprobs: { value: 2 },
  n: { value: 2, base: SAMPLED },
  outputLogits: { value: 'all' },
  outputLastHiddenState: { value: 'generation' },
  logitsProcessor: { value: (_, logits) => logits.fill(0, 65) },
  minDynamicPatch: { value: 3 },
  maxDynamicPatch: { value: 2 },
  useThumbnail: { value: false },
  maxTiles: { value: 2 },
  signal: { value: GIVEN_UP },
};

describe('every option changes something', () => {
  test.each(Object.entries(PIPELINE))('pipeline: %s', async (name, sample) => {
    expect(await seen({ [name]: sample.value }, {})).not.toBe(await seen({}, {}));
  });

  test.each(Object.entries(GENERATION))('generation: %s', async (name, { value, base = {} }) => {
    const without = await seen({}, base);
    expect(await seen({}, { ...base, [name]: value })).not.toBe(without);
    expect(await seen({}, base)).toBe(without);
  });

  test('what would change nothing where no token is drawn is refused', async () => {
    const addon = makeFakeAddon({ answer: () => [] });
    await using pipe = await openPipeline(embeddedModel(), { device: 'cpu' }, addon);
    const useless: object = { maxNewTokens: 3 };
    for (const call of [pipe.promptIds('a', useless), pipe.promptLogits('a', useless)]) {
      await expect(call).rejects.toMatchObject({
        code: 'ERR_TM_INVALID_OPTION',
        message: expect.stringContaining('maxNewTokens'),
      });
    }
  });
});

describe('docs/api.md', () => {
  const text = readFileSync(join(packageRoot(), 'docs', 'api.md'), 'utf8');
  // The first cells of a section's table: names of options.
  function named(heading: string): Set<string> {
    const begin = text.indexOf(heading);
    const section = text.slice(begin, text.indexOf('\n## ', begin + heading.length));
    const cells = section.split('\n').map((line) => /^\| ([^|]*) \|/.exec(line)?.[1] ?? '');
    return new Set(
      cells.flatMap((cell) => [...cell.matchAll(/`(\w+)`/g)].map(([, name]) => name ?? '')),
    );
  }

  test.each([
    ['## `pipeline(', OPTION_NAMES.pipeline],
    ['## `await pipe(', OPTION_NAMES.generation],
  ] as const)('lists the options of %s, and no others', (heading, names) => {
    expect([...named(heading)].sort()).toEqual([...names].sort());
  });
});
