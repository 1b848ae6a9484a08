// estimate(): the memory plan of a pipeline, from a checkpoint's headers and without opening it.
// The plan itself is native code's. Runs on the JS thread.
import { invalidOption } from './check.js';
import { openCheckpoint } from './checkpoint/checkpoint.js';
import { resolveDevice } from './device.js';
import { embeddedModel } from './embedded-model.js';
import { fromNative, loadNative } from './native.js';
import { checkDtype, nativeOptions } from './native-options.js';
import type { MemoryReport, NativeAddon } from './native-types.js';
import { type PipelineOptions, resolvePipelineOptions } from './options.js';

const FOLDER = 'the path of a model folder';

/** Options of `estimate()`: those of `pipeline()`, so that one object serves both. */
export interface EstimateOptions extends PipelineOptions {
  /** Plans as if the device had so many bytes free. Defaults to what it has. */
  readonly freeBytes?: number | undefined;
}

/**
 * The memory plan that `pipeline()` would make, from the checkpoint's headers alone.
 *
 * @example
 * const { totalBytes, kvBlocks } = await estimate('/models/InternVL3-1B-hf', { quantPolicy: 8 });
 */
export async function estimate(
  model?: string,
  given: EstimateOptions = {},
  givenAddon?: NativeAddon,
): Promise<MemoryReport> {
  if (model !== undefined && typeof model !== 'string') throw invalidOption('model', model, FOLDER);
  if (typeof given !== 'object' || given === null) {
    throw invalidOption('estimate options', given, 'an object');
  }
  const { freeBytes, ...rest } = given;
  if (freeBytes !== undefined && !(Number.isSafeInteger(freeBytes) && freeBytes > 0)) {
    throw invalidOption('freeBytes', freeBytes, 'an integer of at least 1');
  }
  const options = resolvePipelineOptions(rest);
  const { signal } = options;
  signal?.throwIfAborted();
  const addon = givenAddon ?? loadNative().addon;
  const [device, checkpoint] = await Promise.all([
    resolveDevice(options.device),
    openCheckpoint(model ?? embeddedModel()),
  ]);
  signal?.throwIfAborted();
  checkDtype(options, device);
  try {
    return addon.estimate({
      ...nativeOptions(checkpoint, options, device),
      freeBytes: freeBytes ?? 0,
    });
  } catch (error) {
    throw fromNative(error);
  }
}
