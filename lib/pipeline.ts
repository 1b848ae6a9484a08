// pipeline() and class Pipeline: opens a checkpoint on a device, and is itself the function that
// answers prompts. Checkpoints, prompts and options are understood elsewhere; this file owns the
// order of opening and closing. Runs on the JS thread; the engine has a thread of its own.
import { join } from 'node:path';
import { Call, type CallOptions } from './call.js';
import { PromptBuilder } from './chat.js';
import { invalidOption } from './check.js';
import { type Checkpoint, openCheckpoint } from './checkpoint/checkpoint.js';
import type { Completion, CompletionListener } from './completion.js';
import { TextStream } from './detokenizer.js';
import { type Prober, type ResolvedDevice, resolveDevice } from './device.js';
import { TurbomindError } from './errors.js';
import { normalizePrompts, type Prompt, type PromptInput } from './messages.js';
import type { PipelineMetrics } from './metrics.js';
import {
  addToRegistry,
  type MetricsRegistry,
  type RegisterMetricsOptions,
} from './metrics-registry.js';
import { fromNative, loadNative, packageRoot } from './native.js';
import { nativeOptions } from './native-options.js';
import type {
  MemoryReport,
  NativeAddon,
  NativeEngine,
  NativeOpenOptions,
  NativeRequest,
  NativeStats,
} from './native-types.js';
import {
  type GenerationOptions,
  type PipelineOptions,
  type PromptOptions,
  type ResolvedPipelineOptions,
  resolvePipelineOptions,
  resolvePromptOptions,
} from './options.js';
import { RequestPreparer } from './prepare.js';
import {
  type EmbedOptions,
  embeddings,
  type GetPplOptions,
  isPromptList,
  type PromptJobContext,
  promptLikelihoods,
  type RawPrompt,
} from './prompt-job.js';
import type { Response } from './response.js';
import { EventRouter } from './router.js';
import { ResponseStream } from './stream.js';
import { GrammarService } from './structured/grammar-service.js';
import { startWorker } from './structured/start-worker.js';
import type { StartWorker } from './structured/worker-port.js';
import { loadTokenizer, type Tokenizer } from './tokenizer.js';

/** Facts about an open pipeline. */
export interface PipelineInfo {
  /** Absolute path of the model folder. */
  readonly model: string;
  readonly architecture: string;
  readonly device: string;
  /** Tokens of prompt and completion together. */
  readonly sessionLen: number;
  readonly parameters: number;
  /** 'none' or 'awq'. */
  readonly quantization: string;
  readonly hasVision: boolean;
}

/** What an open pipeline is made of; tests hand in fakes. */
export interface PipelineParts {
  readonly addon: NativeAddon;
  readonly engine: NativeEngine;
  readonly router: EventRouter;
  readonly checkpoint: Checkpoint;
  readonly tokenizer: Tokenizer;
  readonly options: ResolvedPipelineOptions;
  /** Starts grammar workers; the package's own by default. */
  readonly startWorker?: StartWorker;
}

// A class whose instances are functions: `super(target)` makes `this` the target, so that private
// fields are installed on it.
class Callable {
  constructor(target: object) {
    // biome-ignore lint/correctness/noConstructorReturn: this is how an instance becomes callable
    return Object.setPrototypeOf(target, new.target.prototype);
  }
}
Object.setPrototypeOf(Callable.prototype, Function.prototype);

/**
 * An open model. Call it with a prompt, or with a list of prompts, which run together.
 *
 * @example
 * await using pipe = await pipeline();
 * const { text } = await pipe({ text: 'What colour is the largest shape?', images: ['a.png'] });
 * const answers = await pipe(['What is 37 + 45?', 'Spell the word tensor.']);
 */
export interface Pipeline {
  (prompt: Prompt, options?: GenerationOptions): Promise<Response>;
  (prompts: readonly Prompt[], options?: CallOptions): Promise<Response[]>;
}

// biome-ignore lint/suspicious/noUnsafeDeclarationMerging: the call signatures are Callable's
export class Pipeline extends Callable implements AsyncDisposable {
  readonly #parts: PipelineParts;
  readonly #preparer: RequestPreparer;
  readonly #grammars: GrammarService;
  readonly #unregister: (() => void)[] = [];
  #closing: Promise<void> | undefined;

  /** Made by `pipeline()`. */
  constructor(parts: PipelineParts) {
    const call = (prompt: PromptInput, options?: CallOptions): Promise<Response | Response[]> =>
      this.#run(prompt, options ?? {});
    super(call);
    if (parts?.router === undefined) {
      throw new TurbomindError('ERR_TM_INVALID_ARGUMENT', 'Pipeline: open one with pipeline()');
    }
    this.#parts = parts;
    const { addon, checkpoint, tokenizer, options } = parts;
    const { vocabSize } = checkpoint.spec.decoder;
    this.#grammars = new GrammarService({
      tokenizer,
      vocabSize,
      startWorker: parts.startWorker ?? startWorker,
    });
    this.#preparer = new RequestPreparer({
      addon,
      tokenizer,
      promptBuilder: new PromptBuilder(checkpoint, tokenizer),
      image: checkpoint.image,
      tiling: options.tiling,
      imageLimits: {
        maxPixels: options.maxImagePixels,
        maxBytes: options.maxImageBytes,
        timeoutMs: options.fetchTimeoutMs,
      },
      sessionLen: parts.engine.stats().sessionLen,
      vocabSize,
    });
  }

  /**
   * The answer as it is made. Work starts at the first pull; leaving the loop aborts it.
   *
   * @example
   * for await (const { text } of pipe.stream('Hello!')) process.stdout.write(text);
   */
  stream(prompt: PromptInput, options: CallOptions = {}): ResponseStream {
    return new ResponseStream(this.#call(prompt, options));
  }

  /** Scores of every token of the vocabulary for the place after the prompt, [vocabSize]. */
  async promptLogits(prompt: Prompt, options: PromptOptions = {}): Promise<Float32Array> {
    const { engine } = this.#parts.router;
    const request = await this.#prepare(prompt, options);
    try {
      return await engine.promptLogits({ ...request, id: 0 });
    } catch (error) {
      throw fromNative(error);
    }
  }

  /**
   * How well the model foresees each text: the mean of -ln p over its tokens from the second on, in
   * nats (LMDeploy's `get_ppl`); `Math.exp` of it is the perplexity. Texts are taken as they are,
   * without a chat template, and may be given as token ids. A list answers a list, in order.
   *
   * @throws TurbomindError ERR_TM_INVALID_PROMPT for fewer than two tokens, ERR_TM_PROMPT_TOO_LONG.
   */
  getPpl(prompt: RawPrompt, options?: GetPplOptions): Promise<number>;
  getPpl(prompts: readonly RawPrompt[], options?: GetPplOptions): Promise<number[]>;
  async getPpl(
    prompts: RawPrompt | readonly RawPrompt[],
    options: GetPplOptions = {},
  ): Promise<number | number[]> {
    if (isPromptList(prompts)) return await promptLikelihoods(this.#promptJobs(), prompts, options);
    const [likelihood] = await promptLikelihoods(this.#promptJobs(), [prompts], options);
    return likelihood ?? Number.NaN;
  }

  /**
   * Vectors of texts: the last token's hidden state, or the mean of all, after the last norm. Texts
   * are taken as they are, without a chat template, and may be given as token ids. A list answers a
   * list, in order.
   *
   * @example
   * const [query, document] = await pipe.embed(['a question', 'an answer']);
   *
   * @throws TurbomindError ERR_TM_INVALID_PROMPT for no tokens, ERR_TM_PROMPT_TOO_LONG.
   */
  embed(input: RawPrompt, options?: EmbedOptions): Promise<Float32Array>;
  embed(inputs: readonly RawPrompt[], options?: EmbedOptions): Promise<Float32Array[]>;
  async embed(
    inputs: RawPrompt | readonly RawPrompt[],
    options: EmbedOptions = {},
  ): Promise<Float32Array | Float32Array[]> {
    if (isPromptList(inputs)) return await embeddings(this.#promptJobs(), inputs, options);
    const [vector] = await embeddings(this.#promptJobs(), [inputs], options);
    return vector ?? new Float32Array();
  }

  /** The model's prompt ids for this prompt, those of pictures included. */
  async promptIds(prompt: Prompt, options: PromptOptions = {}): Promise<Int32Array> {
    return (await this.#prepare(prompt, options)).promptTokens;
  }

  async #prepare(prompt: Prompt, options: PromptOptions): Promise<Omit<NativeRequest, 'id'>> {
    void this.#parts.router.engine; // throws once the pipeline is closed
    const [conversation, ...others] = normalizePrompts(prompt).conversations;
    if (conversation === undefined || others.length > 0) {
      const message = `prompt: ${others.length + 1} prompts; expected one, ask for each by itself`;
      throw new TurbomindError('ERR_TM_INVALID_PROMPT', message);
    }
    return await this.#preparer.prepare(conversation, resolvePromptOptions(options));
  }

  /** Text ↔ token ids of this model. */
  get tokenizer(): Tokenizer {
    return this.#parts.tokenizer;
  }

  /** Token ids to text. @throws TurbomindError ERR_TM_INVALID_ARGUMENT for what is no token id. */
  decode(ids: Iterable<number>, options: { readonly skipSpecialTokens?: boolean } = {}): string {
    const stream = new TextStream(this.#parts.tokenizer, options);
    let text = '';
    for (const id of iterable(ids)) {
      if (!Number.isInteger(id) || id < 0) throw notIds(id);
      text += stream.push(id).text;
    }
    return text + stream.flush().text;
  }

  /** Facts that do not change while the pipeline is open. */
  get info(): PipelineInfo {
    const { checkpoint, engine, router } = this.#parts;
    void router.engine;
    const stats = engine.stats();
    return {
      model: checkpoint.folder,
      architecture: checkpoint.architecture,
      device: stats.deviceName,
      sessionLen: stats.sessionLen,
      parameters: checkpoint.totals.parameters,
      quantization: checkpoint.spec.quant.method,
      hasVision: checkpoint.image !== undefined,
    };
  }

  /**
   * The memory plan, made before anything was taken, and what was taken then. What is in use of the
   * KV cache is in `stats()`: `freeBlocks` of `totalBlocks`.
   */
  memory(): MemoryReport {
    return this.#parts.router.engine.memory();
  }

  /** Load, memory and counters at this moment. */
  stats(): NativeStats {
    return this.#parts.router.engine.stats();
  }

  /**
   * What the pipeline has done: requests, tokens, cache, waiting and working times, as plain numbers
   * and histograms.
   */
  metrics(): PipelineMetrics {
    const { router } = this.#parts;
    return router.metrics.snapshot(router.engine.stats());
  }

  /**
   * Puts the metrics into a prom-client registry, which reads them when it is scraped. Returns what
   * takes them out; closing the pipeline does, too.
   *
   * @example
   * pipe.registerMetrics(register, { labels: { model: 'tiny' } });
   * response.end(await register.metrics());
   */
  registerMetrics(registry: MetricsRegistry, options: RegisterMetricsOptions = {}): () => void {
    void this.#parts.router.engine;
    const unregister = addToRegistry(registry, options, () => this.metrics());
    this.#unregister.push(unregister);
    return unregister;
  }

  /**
   * Ends what runs (its calls reject with ERR_TM_DISPOSED), waits for native work and frees the
   * model's memory. Calling it again is harmless.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #promptJobs(): PromptJobContext {
    const { router, tokenizer, checkpoint } = this.#parts;
    return { router, tokenizer, vocabSize: checkpoint.spec.decoder.vocabSize };
  }

  async #close(): Promise<void> {
    this.#parts.router.close();
    for (const unregister of this.#unregister.splice(0)) unregister();
    await Promise.all([this.#grammars.close(), this.#parts.engine.close()]);
  }

  #call(prompt: PromptInput, options: CallOptions): Call {
    const { router, tokenizer } = this.#parts;
    const { vocabSize, hiddenSize } = this.#parts.checkpoint.spec.decoder;
    const sizes = { vocabSize, hiddenSize };
    return new Call(
      { router, tokenizer, preparer: this.#preparer, sizes, grammars: this.#grammars },
      prompt,
      options,
    );
  }

  async #run(prompt: PromptInput, options: CallOptions): Promise<Response | Response[]> {
    const call = this.#call(prompt, options);
    const responses = byPrompt(await collect(call));
    if (call.isBatch()) return responses;
    const [response] = responses;
    if (response === undefined) throw new TurbomindError('ERR_TM_INTERNAL', 'no response');
    if (response.error !== undefined) throw response.error;
    return response;
  }
}

// Types may lie in plain JavaScript.
function iterable(ids: Iterable<number>): Iterable<number> {
  if (typeof ids === 'object' && ids !== null && Symbol.iterator in ids) return ids;
  throw notIds(ids);
}

function notIds(given: unknown): TurbomindError {
  const message = `decode: ${String(given)} is not a token id; expected a list of ids from 0 on`;
  return new TurbomindError('ERR_TM_INVALID_ARGUMENT', message);
}

// One response a prompt. That of several choices is the first that failed, or else the first.
function byPrompt(choices: readonly (readonly Response[])[]): Response[] {
  return choices.flatMap((answers) => {
    const first = answers.find(({ error }) => error !== undefined) ?? answers[0];
    if (first === undefined) return [];
    return [answers.length > 1 ? { ...first, choices: answers } : first];
  });
}

// All responses of a call: those of each prompt in order.
function collect(call: Call): Promise<Response[][]> {
  return new Promise((resolve, reject) => {
    const responses: Response[][] = [];
    let numFinished = 0;
    let total: number | undefined;
    const settle = (): void => {
      if (numFinished === total) resolve(responses);
    };
    const listener: CompletionListener = {
      updated: () => undefined,
      finished: (completion: Completion) => {
        const { index, choice, response } = completion;
        const answers = responses[index] ?? [];
        responses[index] = answers;
        if (response !== undefined) answers[choice] = response;
        numFinished += 1;
        settle();
      },
      failed: reject,
    };
    call.start(listener).then(
      (count) => {
        total = count;
        settle();
      },
      (reason: unknown) => {
        call.abort();
        reject(reason);
      },
    );
  });
}

/** Folder of the model that comes with this package. */
export function embeddedModel(): string {
  return join(packageRoot(), 'models', 'tiny-internvl');
}

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
    const engine = await abortable(opening, signal);
    router.attach(engine);
    return new Pipeline({ addon, engine, router, checkpoint, tokenizer, options });
  } catch (error) {
    // Nobody else will: a load that was aborted or whose tokenizer is broken is undone here.
    await opening.then(
      (engine) => engine.close(),
      () => undefined,
    );
    throw error;
  }
}

// A wish that this device cannot honour is refused, never dropped.
function checkDtype({ dtype, device }: ResolvedPipelineOptions, resolved: ResolvedDevice): void {
  if (dtype === 'auto' || resolved.device !== 'cpu') return;
  const found = device === 'auto' ? " (device: 'auto' found no usable GPU)" : '';
  throw new TurbomindError(
    'ERR_TM_INVALID_OPTION',
    `dtype: '${dtype}' needs a GPU, and this pipeline runs on the CPU${found}, which computes in ` +
      "float32; use dtype: 'auto'",
  );
}

function withTemplate(checkpoint: Checkpoint, template: string | undefined): Checkpoint {
  if (template === undefined) return checkpoint;
  const chatTemplate = { type: 'jinja', file: 'the chatTemplate option', template } as const;
  return { ...checkpoint, chatTemplate };
}

const FOLDER = 'the path of a model folder';

/** Options of `estimate()`. */
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
  const addon = givenAddon ?? loadNative().addon;
  const [device, checkpoint] = await Promise.all([
    resolveDevice(options.device),
    openCheckpoint(model ?? embeddedModel()),
  ]);
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

// Native loading cannot be interrupted; the caller of an aborted load does not wait for it.
async function abortable<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return await promise;
  signal.throwIfAborted();
  let unlisten = (): void => undefined;
  const aborted = new Promise<never>((_, reject) => {
    const onAbort = (): void => reject(signal.reason);
    signal.addEventListener('abort', onAbort, { once: true });
    unlisten = () => signal.removeEventListener('abort', onAbort);
  });
  try {
    return await Promise.race([promise, aborted]);
  } finally {
    unlisten();
  }
}
