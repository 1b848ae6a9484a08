// PipelineOptions → ResolvedPipelineOptions: every value checked, contradictions refused, defaults
// filled in. What the device or the model decides is left open. Pure functions.
import { checkOptions } from '../check.js';
import { TurbomindError } from '../errors.js';
import type {
  PipelineOptions,
  ResolvedPipelineOptions,
  SpeculativeConfig,
} from './pipeline-options.js';
import { MAX_SPECULATIVE_TOKENS, PIPELINE_RULES } from './pipeline-rules.js';
import { resolveTiling } from './tiling.js';

/** @throws TurbomindError ERR_TM_INVALID_OPTION */
export function resolvePipelineOptions(options: PipelineOptions = {}): ResolvedPipelineOptions {
  checkOptions<PipelineOptions>('pipeline options', options, PIPELINE_RULES);
  checkMemory(options);
  return {
    device: options.device ?? 'auto',
    dtype: options.dtype ?? 'auto',
    threads: options.threads ?? 0,
    sessionLen: options.sessionLen ?? 0,
    maxBatchSize: options.maxBatchSize ?? 128,
    maxPrefillTokenNum: options.maxPrefillTokenNum,
    cacheMaxEntryCount: options.cacheMaxEntryCount === 'auto' ? 0 : options.cacheMaxEntryCount,
    kvCacheBytes: options.kvCacheBytes ?? 0,
    memoryBudgetBytes: options.memoryBudgetBytes ?? 0,
    swapSpaceBytes: options.swapSpaceBytes ?? -1,
    enablePrefixCaching: options.enablePrefixCaching ?? true,
    maxQueueSize: options.maxQueueSize ?? 0,
    maxInterTokenLatencyMs: options.maxInterTokenLatencyMs ?? 0,
    quantPolicy: options.quantPolicy ?? 0,
    blockSize: options.cacheBlockSeqLen ?? 64,
    numSpeculativeTokens: resolveSpeculation(options.speculativeConfig),
    tiling: resolveTiling(options),
    maxImagePixels: options.maxImagePixels ?? 100_000_000,
    fetchTimeoutMs: options.imageFetch?.timeoutMs ?? 30_000,
    maxImageBytes: options.imageFetch?.maxBytes ?? 64 * 2 ** 20,
    tokenizer: options.tokenizer,
    chatTemplate: options.chatTemplate,
    signal: options.signal,
    onProgress: options.onProgress,
    cpuIsa: options.cpuIsa ?? '',
  };
}

// Three ways to size one cache.
function checkMemory(options: PipelineOptions): void {
  const given = (['cacheMaxEntryCount', 'kvCacheBytes', 'memoryBudgetBytes'] as const).filter(
    (key) => options[key] !== undefined,
  );
  if (given.length < 2) return;
  throw new TurbomindError(
    'ERR_TM_INVALID_OPTION',
    `${given.join(' and ')} exclude each other: each says how large the KV cache is; give one`,
  );
}

function resolveSpeculation(config: SpeculativeConfig = { method: 'ngram' }): number {
  return config.method === 'none' ? 0 : (config.numSpeculativeTokens ?? MAX_SPECULATIVE_TOKENS);
}
