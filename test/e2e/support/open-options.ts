// What tests of the bare addon open: the library's own list of options, made small.
import { nativeOptions } from '../../../lib/native-options.js';
import type { NativeOpenOptions } from '../../../lib/native-types.js';
import { resolvePipelineOptions } from '../../../lib/options.js';

/** One thread of the CPU, four sequences, blocks of 16 tokens. */
export function openOptions(
  checkpoint: Pick<NativeOpenOptions, 'spec' | 'files' | 'tensors'>,
): NativeOpenOptions {
  const options = resolvePipelineOptions({
    threads: 1,
    maxBatchSize: 4,
    maxPrefillTokenNum: 64,
    cacheMaxEntryCount: 0.1,
    speculativeConfig: { method: 'none' },
  });
  return {
    ...nativeOptions(checkpoint, options, { device: 'cpu', cudaLibrary: '' }),
    blockSize: 16,
  };
}
