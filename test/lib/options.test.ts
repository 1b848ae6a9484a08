import { describe, expect, test } from 'vitest';
import { nearestName } from '../../lib/check.js';
import {
  type GenerationOptions,
  type PipelineOptions,
  resolveGenerationOptions,
  resolvePipelineOptions,
} from '../../lib/options.js';

// What a caller without types may pass.
function generate(options: object): unknown {
  return resolveGenerationOptions(options as GenerationOptions);
}
function open(options: object): unknown {
  return resolvePipelineOptions(options as PipelineOptions);
}

function messageOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    expect(error).toMatchObject({ name: 'TurbomindError', code: 'ERR_TM_INVALID_OPTION' });
    return error instanceof Error ? error.message : '';
  }
  throw new Error('nothing was thrown');
}

describe('unknown keys', () => {
  test.each([
    ['max_new_tokens', 'maxNewTokens'],
    ['maxnewtokens', 'maxNewTokens'],
    ['maxNewToken', 'maxNewTokens'],
    ['max_tokens', 'maxNewTokens'],
    ['temprature', 'temperature'],
    ['top_k', 'topK'],
    ['seed', 'randomSeed'],
    ['stop', 'stopWords'],
    ['repetition_penalty', 'repetitionPenalty'],
  ])('%s suggests %s', (wrong, right) => {
    expect(messageOf(() => generate({ [wrong]: 1 }))).toContain(`did you mean ${right}?`);
  });

  test('of a pipeline suggest too', () => {
    expect(messageOf(() => open({ session_len: 1 }))).toContain('did you mean sessionLen?');
    expect(messageOf(() => open({ numThreads: 1 }))).toContain('did you mean threads?');
    expect(messageOf(() => open({ imageFetch: { timeout: 1 } }))).toContain('timeoutMs');
  });

  test('without a near name list the known ones', () => {
    expect(messageOf(() => generate({ zzzzzzzzzz: 1 }))).toContain('known options: maxNewTokens');
    expect(nearestName('zzzzzzzzzz', ['maxNewTokens'])).toBeUndefined();
  });
});

describe('values', () => {
  test.each([
    { maxNewTokens: 0 },
    { maxNewTokens: 1.5 },
    { maxNewTokens: '5' },
    { minNewTokens: -1 },
    { maxNewTokens: 3, minNewTokens: 4 },
    { doSample: 1 },
    { doSample: true, temperature: -0.1 },
    { doSample: true, temperature: 2.1 },
    { doSample: true, temperature: Number.NaN },
    { doSample: true, topK: -1 },
    { doSample: true, topP: 0 },
    { doSample: true, topP: 1.01 },
    { doSample: true, minP: 1 },
    { doSample: true, randomSeed: -1 },
    { doSample: true, randomSeed: 2n ** 64n },
    { repetitionPenalty: 0 },
    { frequencyPenalty: 2.1 },
    { presencePenalty: Number.NaN },
    { logitBias: [1, 2] },
    { logitBias: { hello: 1 } },
    { logitBias: { 5: 101 } },
    { logitBias: { 5: '1' } },
    { logitBias: new Map([[-1, 1]]) },
    { logprobs: 2, topLogprobs: 3 },
    { logprobs: false, topLogprobs: 3 },
    { topLogprobs: 1025 },
    { stopWords: 'text' },
    { stopWords: [''] },
    { stopTokenIds: [-1] },
    { badWords: [1] },
    { ignoreEos: 'yes' },
    { logprobs: -1 },
    { logprobs: 1025 },
    { minDynamicPatch: 4, maxDynamicPatch: 3 },
    { maxTiles: 0 },
    { signal: {} },
  ])('generation: %o is refused and named', (options) => {
    const message = messageOf(() => generate(options));
    expect(Object.keys(options).some((key) => message.includes(key))).toBe(true);
    expect(message).toContain('expected');
  });

  test.each([
    { device: 'gpu' },
    { device: 'cuda:x' },
    { dtype: 'float32' },
    { threads: -1 },
    { sessionLen: 0 },
    { maxBatchSize: 0 },
    { maxPrefillTokenNum: 0 },
    { cacheMaxEntryCount: 0 },
    { cacheMaxEntryCount: 1.1 },
    { cacheBlockSeqLen: 32 },
    { cacheMaxEntryCount: 'all' },
    { kvCacheBytes: 0 },
    { memoryBudgetBytes: 1.5 },
    { quantPolicy: 2 },
    { quantPolicy: '8' },
    { speculativeConfig: 'ngram' },
    { speculativeConfig: {} },
    { speculativeConfig: { method: 'eagle' } },
    { speculativeConfig: { method: 'ngram', numSpeculativeTokens: 8 } },
    { speculativeConfig: { method: 'none', numSpeculativeTokens: 1 } },
    { tp: 2 },
    { useThumbnail: 1 },
    { maxImagePixels: 0 },
    { imageFetch: { timeoutMs: 0 } },
    { tokenizer: {} },
    { chatTemplate: '' },
    { onProgress: 1 },
    { cpuIsa: 'neon' },
  ])('pipeline: %o is refused and named', (options) => {
    const [key = ''] = Object.keys(options);
    const inner =
      key === 'imageFetch'
        ? /timeoutMs/
        : new RegExp(key === 'speculativeConfig' ? `${key}|method|numSpeculativeTokens` : key);
    expect(messageOf(() => open(options))).toMatch(inner);
  });

  test('one way to size the KV cache at a time', () => {
    const two = { kvCacheBytes: 2 ** 30, memoryBudgetBytes: 2 ** 31 };
    expect(messageOf(() => open(two))).toContain('exclude each other');
    expect(messageOf(() => open({ kvCacheBytes: 1, cacheMaxEntryCount: 0.5 }))).toContain(
      'cacheMaxEntryCount and kvCacheBytes',
    );
    expect(open({ cacheMaxEntryCount: 'auto' })).toMatchObject({ cacheMaxEntryCount: 0 });
  });

  test('what is not implemented says so', () => {
    expect(messageOf(() => open({ tp: 2 }))).toContain('not implemented');
    expect(messageOf(() => open({ cacheBlockSeqLen: 128 }))).toContain('not implemented');
  });

  test('options must be an object', () => {
    expect(messageOf(() => generate([]))).toContain('expected an object');
    expect(messageOf(() => resolveGenerationOptions(JSON.parse('null')))).toContain('an object');
  });
});

describe('sampling', () => {
  test.each(['temperature', 'topK', 'topP', 'minP', 'randomSeed'])(
    '%s without doSample is refused, because it could change nothing',
    (key) => {
      const value = key === 'topK' || key === 'randomSeed' ? 1 : 0.5;
      expect(messageOf(() => generate({ [key]: value }))).toContain('add doSample: true');
      expect(generate({ doSample: true, [key]: value })).toMatchObject({ doSample: true });
    },
  );

  test('temperature 0 is greedy, with doSample or without', () => {
    expect(resolveGenerationOptions({ temperature: 0 }).doSample).toBe(false);
    expect(resolveGenerationOptions({ temperature: 0, doSample: true }).doSample).toBe(false);
    expect(messageOf(() => generate({ temperature: 0, topK: 5 }))).toContain('topK: has no effect');
  });

  test('a seed is kept in all its 64 bits; without one two differ', () => {
    const max = 2n ** 64n - 1n;
    const given = resolveGenerationOptions({ doSample: true, randomSeed: max });
    expect(given.seed).toBe(max);
    const first = resolveGenerationOptions({ doSample: true }).seed;
    expect(resolveGenerationOptions({ doSample: true }).seed).not.toBe(first);
  });

  test('defaults are LMDeploy’s', () => {
    expect(resolveGenerationOptions({ doSample: true, randomSeed: 1 })).toMatchObject({
      maxNewTokens: 512,
      temperature: 0.8,
      topK: 50,
      topP: 1,
      minP: 0,
      repetitionPenalty: 1,
      ignoreEos: false,
      skipSpecialTokens: true,
      numLogprobs: 0,
    });
    expect(resolveGenerationOptions()).toMatchObject({ doSample: false, maxNewTokens: 512 });
  });

  test('logprobs may be a number or a flag', () => {
    expect(resolveGenerationOptions({ logprobs: true }).numLogprobs).toBe(1);
    expect(resolveGenerationOptions({ logprobs: false }).numLogprobs).toBe(0);
    expect(resolveGenerationOptions({ logprobs: 5 }).numLogprobs).toBe(5);
  });

  test('topLogprobs implies logprobs; 0 lists none', () => {
    const counts = (options: GenerationOptions): unknown => {
      const { numLogprobs, numTopLogprobs } = resolveGenerationOptions(options);
      return [numLogprobs, numTopLogprobs];
    };
    expect(counts({ topLogprobs: 4 })).toEqual([4, 4]);
    expect(counts({ logprobs: true, topLogprobs: 4 })).toEqual([4, 4]);
    expect(counts({ logprobs: true, topLogprobs: 0 })).toEqual([1, 0]);
    expect(counts({ logprobs: false, topLogprobs: 0 })).toEqual([0, 0]);
    expect(counts({ topLogprobs: 0 })).toEqual([0, 0]);
    expect(counts({ logprobs: 3 })).toEqual([3, 3]);
  });

  test('logitBias may be an object or a Map; zeros are dropped', () => {
    expect(resolveGenerationOptions({ logitBias: { 5: -100, 7: 0, 9: 1.5 } }).logitBias).toEqual([
      [5, -100],
      [9, 1.5],
    ]);
    expect(resolveGenerationOptions({ logitBias: new Map([[3, 2]]) }).logitBias).toEqual([[3, 2]]);
    expect(resolveGenerationOptions({}).logitBias).toEqual([]);
  });

  test('undefined means the default', () => {
    expect(resolveGenerationOptions({ maxNewTokens: undefined }).maxNewTokens).toBe(512);
  });
});
