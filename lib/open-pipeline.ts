// pipeline(): opens a checkpoint on a device. Owns the order in which device, checkpoint, engine and
// tokenizer are opened, and undoes what was opened when a load fails or is aborted. Runs on the JS
// thread; the engine has a thread of its own.
import { abortable } from './abortable.js';
import { PromptBuilder } from './chat.js';
import { type Checkpoint, openCheckpoint } from './checkpoint/checkpoint.js';
import { type Prober, resolveDevice } from './device.js';
import { embeddedModel } from './embedded-model.js';
import { TurbomindError } from './errors.js';
import { fromNative, loadNative } from './native.js';
import { checkDtype, nativeOptions } from './native-options.js';
import type { NativeAddon, NativeEngine, NativeOpenOptions } from './native-types.js';
import {
  type PipelineOptions,
  type ResolvedPipelineOptions,
  resolvePipelineOptions,
} from './options.js';
import { Pipeline } from './pipeline.js';
import { rehearse } from './rehearsal.js';
import { EventRouter } from './router.js';
import { loadTokenizer } from './tokenizer.js';

/**
 * Opens a Hugging Face model folder; without one, the small model that comes with this package.
 *
 * @example
 * const pipe = await pipeline('/models/InternVL3-1B-hf', { device: 'cpu', sessionLen: 4096 });
 */
export function pipeline(options?: PipelineOptions): Promise<Pipeline>;
export function pipeline(model: string | undefined, options?: PipelineOptions): Promise<Pipeline>;
export async function pipeline(
  first?: string | PipelineOptions,
  second?: PipelineOptions,
): Promise<Pipeline> {
  const [model, options] = readArguments(first, second);
  return await openPipeline(model ?? embeddedModel(), options);
}

function readArguments(
  first: unknown,
  second: PipelineOptions | undefined,
): [string | undefined, PipelineOptions | undefined] {
  if (first === undefined || typeof first === 'string') return [first, second];
  if (typeof first === 'object' && first !== null && second === undefined)
    return [undefined, first];
  const message = 'pipeline: expected pipeline(model?, options?), model being the path of a folder';
  throw new TurbomindError('ERR_TM_INVALID_OPTION', message);
}

/** `pipeline()` with the addon and the GPU probe given; tests hand in fakes. */
export async function openPipeline(
  model: string,
  given?: PipelineOptions,
  givenAddon?: NativeAddon,
  givenProbe?: Prober,
): Promise<Pipeline> {
  const options = resolvePipelineOptions(given);
  const { signal } = options;
  signal?.throwIfAborted();
  const addon = givenAddon ?? loadNative().addon;
  const [device, found] = await Promise.all([
    resolveDevice(options.device, givenProbe),
    openCheckpoint(model),
  ]);
  signal?.throwIfAborted();
  checkDtype(options, device);
  const checkpoint = withTemplate(found, options.chatTemplate);
  const router = new EventRouter();
  const opening = openEngine(addon, nativeOptions(checkpoint, options, device), router, options);
  opening.catch(() => undefined); // it is awaited below, after the tokenizer is read
  try {
    const tokenizer = options.tokenizer ?? (await loadTokenizer(checkpoint));
    tokenizer.prepare();
    const promptBuilder = new PromptBuilder(checkpoint, tokenizer);
    const parts = { addon, checkpoint, tokenizer, promptBuilder, options };
    await rehearse(parts);
    // Native loading cannot be interrupted; the caller of an aborted load does not wait for it.
    const engine = await abortable(opening, signal);
    router.attach(engine);
    return new Pipeline({ ...parts, engine, router });
  } catch (error) {
    // Nobody else will: a load that was aborted or whose tokenizer is broken is undone here.
    await opening.then(
      (engine) => engine.close(),
      () => undefined,
    );
    throw error;
  }
}

function withTemplate(checkpoint: Checkpoint, template: string | undefined): Checkpoint {
  if (template === undefined) return checkpoint;
  const chatTemplate = { type: 'jinja', file: 'the chatTemplate option', template } as const;
  return { ...checkpoint, chatTemplate };
}

async function openEngine(
  addon: NativeAddon,
  options: NativeOpenOptions,
  router: EventRouter,
  { onProgress }: ResolvedPipelineOptions,
): Promise<NativeEngine> {
  // What the caller's function throws ends the load, not the process.
  const thrown: unknown[] = [];
  const report = (share: number): void => {
    if (thrown.length > 0) return;
    try {
      onProgress?.(share);
    } catch (error) {
      thrown.push(error);
    }
  };
  const engine = await addon.open(options, router.onEvents, report).catch((error: unknown) => {
    throw fromNative(error);
  });
  if (thrown.length === 0) return engine;
  await engine.close();
  throw thrown[0];
}
