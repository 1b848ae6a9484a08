// A pipeline's options → those of the addon, with what a device decides filled in and what it cannot
// honour refused. The one place that lists them all. Pure functions.
import type { ResolvedDevice } from './device.js';
import { TurbomindError } from './errors.js';
import type { NativeOpenOptions } from './native-types.js';
import type { ResolvedPipelineOptions } from './options.js';

// Prompt tokens of one step: enough to keep the device busy, few enough that decoding requests do
// not wait long.
const CPU_PREFILL_TOKENS = 512;
const GPU_PREFILL_TOKENS = 8192;

/** What native code is asked to open: a checkpoint, as `options` say, on a device that was found. */
export function nativeOptions(
  checkpoint: Pick<NativeOpenOptions, 'spec' | 'files' | 'tensors'>,
  options: ResolvedPipelineOptions,
  { device, cudaLibrary }: ResolvedDevice,
): NativeOpenOptions {
  const longest = Math.max(
    CPU_PREFILL_TOKENS,
    options.sessionLen || checkpoint.spec.decoder.maxPositionEmbeddings,
  );
  return {
    spec: checkpoint.spec,
    files: checkpoint.files,
    tensors: checkpoint.tensors,
    device,
    dtype: options.dtype,
    threads: options.threads,
    sessionLen: options.sessionLen,
    maxBatchSize: options.maxBatchSize,
    maxPrefillTokenNum:
      options.maxPrefillTokenNum ??
      (device === 'cpu' ? CPU_PREFILL_TOKENS : Math.min(GPU_PREFILL_TOKENS, longest)),
    blockSize: options.blockSize,
    numSpeculativeTokens: options.numSpeculativeTokens,
    cacheMaxEntryCount: options.cacheMaxEntryCount ?? (device === 'cpu' ? 0.5 : 0.8),
    kvCacheBytes: options.kvCacheBytes,
    memoryBudgetBytes: options.memoryBudgetBytes,
    swapSpaceBytes: options.swapSpaceBytes,
    freeBytes: 0,
    enablePrefixCaching: options.enablePrefixCaching,
    maxQueueSize: options.maxQueueSize,
    maxInterTokenLatencyMs: options.maxInterTokenLatencyMs,
    quantPolicy: options.quantPolicy,
    cpuIsa: options.cpuIsa,
    cudaLibrary,
  };
}

/**
 * A wish that this device cannot honour is refused, never dropped.
 * @throws TurbomindError ERR_TM_INVALID_OPTION
 */
export function checkDtype(
  { dtype, device }: ResolvedPipelineOptions,
  resolved: ResolvedDevice,
): void {
  if (dtype === 'auto' || resolved.device !== 'cpu') return;
  const found = device === 'auto' ? " (device: 'auto' found no usable GPU)" : '';
  throw new TurbomindError(
    'ERR_TM_INVALID_OPTION',
    `dtype: '${dtype}' needs a GPU, and this pipeline runs on the CPU${found}, which computes in ` +
      "float32; use dtype: 'auto'",
  );
}
