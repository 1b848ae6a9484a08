// class Pipeline, which is itself the function that answers prompts: each way to ask an open model,
// and its end. Opening is open-pipeline.ts's; checkpoints, prompts and options are understood
// elsewhere. Runs on the JS thread; the engine has a thread of its own.
import { abortable } from './abortable.js';
import { Call, type CallOptions } from './call.js';
import { Callable } from './callable.js';
import { byPrompt, collect } from './collect.js';
import { type DecodeOptions, decodeIds } from './detokenizer.js';
import { TurbomindError } from './errors.js';
import { normalizePrompts, type Prompt, type PromptInput } from './messages.js';
import type { PipelineMetrics } from './metrics.js';
import {
  addToRegistry,
  type MetricsRegistry,
  type RegisterMetricsOptions,
} from './metrics-registry.js';
import { fromNative } from './native.js';
import type { MemoryReport, NativeRequest, NativeStats } from './native-types.js';
import { type GenerationOptions, type PromptOptions, resolvePromptOptions } from './options.js';
import {
  createPreparer,
  type PipelineInfo,
  type PipelineParts,
  pipelineInfo,
} from './pipeline-parts.js';
import type { RequestPreparer } from './prepare.js';
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
import { ResponseStream } from './stream.js';
import { GrammarService } from './structured/grammar-service.js';
import { startWorker } from './structured/start-worker.js';
import type { Tokenizer } from './tokenizer.js';

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
    const { checkpoint, tokenizer } = parts;
    this.#grammars = new GrammarService({
      tokenizer,
      vocabSize: checkpoint.spec.decoder.vocabSize,
      startWorker: parts.startWorker ?? startWorker,
    });
    this.#preparer = createPreparer(parts, parts.engine.stats().sessionLen);
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
    const compute = async (): Promise<Float32Array> => {
      try {
        return await engine.promptLogits({ ...request, id: 0 });
      } catch (error) {
        throw fromNative(error);
      }
    };
    return await abortable(compute(), options.signal);
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
  decode(ids: Iterable<number>, options: DecodeOptions = {}): string {
    return decodeIds(this.#parts.tokenizer, ids, options);
  }

  /** Facts that do not change while the pipeline is open. */
  get info(): PipelineInfo {
    void this.#parts.router.engine; // throws once the pipeline is closed
    return pipelineInfo(this.#parts);
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
