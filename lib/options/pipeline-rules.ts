// Which values each option of a pipeline may have, one by one. What options say together is
// resolve-pipeline.ts's. Pure functions.
import * as check from '../check.js';
import type { ImageFetchOptions, PipelineOptions, SpeculativeConfig } from './pipeline-options.js';
import { TILING_RULES } from './tiling.js';

const device: check.Rule = (value) =>
  typeof value === 'string' && /^(auto|cpu|cuda|cuda:\d{1,3})$/.test(value)
    ? undefined
    : "'auto', 'cpu', 'cuda' or 'cuda:N'";

const imageFetch: check.Rule = (value) => {
  check.checkOptions<ImageFetchOptions>('imageFetch', value, {
    timeoutMs: check.integer(1, check.MAX_INT32),
    maxBytes: check.integer(1, 2 ** 32),
  });
  return undefined;
};

export const MAX_SPECULATIVE_TOKENS = 7;

const speculativeConfig: check.Rule = (value) => {
  check.checkOptions<SpeculativeConfig>('speculativeConfig', value, {
    method: check.oneOf('ngram', 'none'),
    numSpeculativeTokens: check.integer(1, MAX_SPECULATIVE_TOKENS),
  });
  if (value.method === undefined) return "a method: 'ngram' or 'none'";
  return value.method === 'none' && value.numSpeculativeTokens !== undefined
    ? "no numSpeculativeTokens with method 'none'"
    : undefined;
};

const TOKENIZER_METHODS = ['encode', 'idOf', 'bytesOf', 'textOf', 'isSpecial', 'prepare'];

const tokenizer: check.Rule = (value) => {
  const expected = 'an object that implements Tokenizer';
  if (typeof value !== 'object' || value === null) return expected;
  const lacks = TOKENIZER_METHODS.find((name) => typeof Reflect.get(value, name) !== 'function');
  if (lacks !== undefined) return `${expected}, with a function ${lacks}`;
  const lists = ['eosIds', 'specialTokens'];
  const list = lists.find((name) => !Array.isArray(Reflect.get(value, name)));
  if (list !== undefined) return `${expected}, with a list ${list}`;
  // Not read: what they answer may take time to find out.
  const other = ['vocabSize', 'stripsLeadingSpace'].find((name) => !(name in value));
  return other === undefined ? undefined : `${expected}, with ${other}`;
};

export const PIPELINE_RULES: check.Rules<PipelineOptions> = {
  device,
  dtype: check.oneOf('auto', 'float16', 'bfloat16'),
  threads: check.integer(0, 1024),
  sessionLen: check.integer(1, check.MAX_INT32),
  maxBatchSize: check.integer(1, 4096),
  maxPrefillTokenNum: check.integer(1, 2 ** 20),
  cacheMaxEntryCount: check.either(
    check.number('above 0 and at most 1', (value) => value > 0 && value <= 1),
    check.oneOf('auto'),
  ),
  kvCacheBytes: check.integer(1),
  memoryBudgetBytes: check.integer(1),
  swapSpaceBytes: check.integer(0),
  cacheBlockSeqLen: check.exactly(64, '64: other block sizes are not implemented'),
  enablePrefixCaching: check.boolean,
  maxQueueSize: check.integer(1, check.MAX_INT32),
  maxInterTokenLatencyMs: check.number('above 0', (value) => value > 0),
  quantPolicy: (value) =>
    value === 0 || value === 4 || value === 8 ? undefined : '0 (not quantised), 8 or 4 bits',
  speculativeConfig,
  tp: check.exactly(1, '1: splitting a model over devices is not implemented'),
  ...TILING_RULES,
  maxImagePixels: check.integer(1, 2 ** 32),
  imageFetch,
  tokenizer,
  chatTemplate: check.text,
  signal: check.abortSignal,
  onProgress: check.callback,
  cpuIsa: check.oneOf('scalar', 'avx2', 'avx512', 'amx'),
};
