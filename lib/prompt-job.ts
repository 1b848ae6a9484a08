// Requests that read a prompt and write no text: perplexity and embeddings. Turns texts or ids into
// requests without a completion, keeps a bounded number of them in flight and ends all when one
// fails or the caller aborts. Runs on the JS thread.
import { setMaxListeners } from 'node:events';
import * as check from './check.js';
import { TurbomindError } from './errors.js';
import { Limiter } from './limiter.js';
import { fromNative, nativeErrorCode } from './native.js';
import type {
  NativeEvent,
  NativeOutputSpec,
  NativeOutputs,
  NativeRequest,
  NativeSampling,
} from './native-types.js';
import type { EventRouter, RequestHandler } from './router.js';
import type { Tokenizer } from './tokenizer.js';
import { ENCODING_SLICE_MS, Turns } from './turns.js';

/** A text, taken as it is and without a chat template, or its token ids. */
export type RawPrompt = string | readonly number[] | Int32Array;

export interface GetPplOptions {
  /** Ends it: the call rejects with `signal.reason`. */
  readonly signal?: AbortSignal | undefined;
}

export interface EmbedOptions {
  /**
   * The hidden state of the last token, as decoder embedding models are trained, or the mean over
   * all tokens. Defaults to 'last'.
   */
  readonly pooling?: 'last' | 'mean' | undefined;
  /** Scales each vector to length 1, so that a dot product is the cosine. Defaults to true. */
  readonly normalize?: boolean | undefined;
  /** Ends it: the call rejects with `signal.reason`. */
  readonly signal?: AbortSignal | undefined;
}

export interface PromptJobContext {
  readonly router: EventRouter;
  readonly tokenizer: Tokenizer;
  readonly vocabSize: number;
}

const PPL_RULES: check.Rules<GetPplOptions> = { signal: check.abortSignal };
const EMBED_RULES: check.Rules<EmbedOptions> = {
  pooling: check.oneOf('last', 'mean'),
  normalize: check.boolean,
  signal: check.abortSignal,
};

/** Requests in the engine at a time: enough to fill its batches, few enough to end soon. */
const MAX_IN_FLIGHT = 256;

/** The best token, nothing added, nothing reported. */
export const GREEDY: NativeSampling = {
  doSample: false,
  temperature: 1,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  frequencyPenalty: 0,
  presencePenalty: 0,
  logitBias: [],
  seed: 0n,
  numLogprobs: 0,
  badWords: [],
};

/** Mean of -log p over the tokens of each prompt from the second on. */
export async function promptLikelihoods(
  context: PromptJobContext,
  prompts: readonly RawPrompt[],
  options: GetPplOptions,
): Promise<number[]> {
  check.checkOptions<GetPplOptions>('getPpl options', options, PPL_RULES);
  const ids = await allIds(context, prompts, 2, options.signal);
  const spec = { ...NO_OUTPUTS, promptNll: true };
  const outputs = await runAll(context, ids, spec, options.signal);
  return outputs.map(({ nll, numNllTokens }) => nll / numNllTokens);
}

/** Pooled hidden states of each input, [hidden size]. */
export async function embeddings(
  context: PromptJobContext,
  inputs: readonly RawPrompt[],
  options: EmbedOptions,
): Promise<Float32Array[]> {
  check.checkOptions<EmbedOptions>('embed options', options, EMBED_RULES);
  const ids = await allIds(context, inputs, 1, options.signal);
  const spec = { ...NO_OUTPUTS, pooling: options.pooling ?? 'last' };
  const outputs = await runAll(context, ids, spec, options.signal);
  return outputs.map(({ pooled }) => scaled(pooled, options.normalize ?? true));
}

/** One prompt or a list of them; a list of numbers is one prompt. */
export function isPromptList(
  prompts: RawPrompt | readonly RawPrompt[],
): prompts is readonly RawPrompt[] {
  return Array.isArray(prompts) && (prompts.length === 0 || typeof prompts[0] !== 'number');
}

const NO_OUTPUTS: NativeOutputSpec = {
  logits: 'none',
  hiddenStates: 'none',
  pooling: 'none',
  promptNll: false,
};

function scaled(vector: readonly number[], normalize: boolean): Float32Array {
  if (!normalize) return Float32Array.from(vector);
  const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  return Float32Array.from(vector, (value) => (length === 0 ? 0 : value / length));
}

// Nothing is sent before all are read: a wrong one refuses the call.
async function allIds(
  context: PromptJobContext,
  prompts: readonly RawPrompt[],
  fewest: number,
  signal: AbortSignal | undefined,
): Promise<Int32Array[]> {
  void context.router.engine; // a closed pipeline says so
  const turns = new Turns(ENCODING_SLICE_MS);
  const all: Int32Array[] = [];
  for (const [index, prompt] of prompts.entries()) {
    await turns.giveWay();
    signal?.throwIfAborted();
    all.push(toIds(context, prompt, index, fewest));
  }
  return all;
}

function toIds(
  { tokenizer, vocabSize }: PromptJobContext,
  prompt: RawPrompt,
  index: number,
  fewest: number,
): Int32Array {
  const ids = readIds(tokenizer, prompt, index);
  const wrong = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabSize);
  if (wrong !== undefined) {
    throw invalidPrompt(index, `${wrong} is not a token id; expected 0 to ${vocabSize - 1}`);
  }
  if (ids.length < fewest) {
    throw invalidPrompt(index, `${ids.length} token(s); at least ${fewest} needed`);
  }
  return Int32Array.from(ids);
}

function readIds(tokenizer: Tokenizer, prompt: unknown, index: number): Int32Array | number[] {
  if (typeof prompt === 'string') return tokenizer.encode(prompt, { addSpecialTokens: true });
  if (prompt instanceof Int32Array) return prompt;
  if (Array.isArray(prompt) && prompt.every((id) => typeof id === 'number')) return prompt;
  throw invalidPrompt(index, 'expected a text, a list of token ids or an Int32Array');
}

function invalidPrompt(index: number, problem: string): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_PROMPT', `prompt[${index}]: ${problem}`);
}

// All outputs in order. The first failure, or the signal, ends what still runs.
async function runAll(
  { router }: PromptJobContext,
  prompts: readonly Int32Array[],
  outputs: NativeOutputSpec,
  signal: AbortSignal | undefined,
): Promise<NativeOutputs[]> {
  signal?.throwIfAborted();
  const ended = new AbortController();
  setMaxListeners(0, ended.signal); // one for each request in flight
  const onAbort = (): void => ended.abort(signal?.reason);
  signal?.addEventListener('abort', onAbort, { once: true });
  const limiter = new Limiter(MAX_IN_FLIGHT);
  const jobs = prompts.map((promptTokens) =>
    limiter.run(() => runOne(router, { ...PLAIN, promptTokens, outputs }, ended.signal)),
  );
  try {
    return await Promise.all(jobs);
  } catch (error) {
    ended.abort(error);
    await Promise.allSettled(jobs);
    throw error;
  } finally {
    signal?.removeEventListener('abort', onAbort);
  }
}

const PLAIN = {
  images: [],
  sampling: GREEDY,
  maxNewTokens: 0,
  minNewTokens: 0,
  stopTokenIds: [],
} as const;

async function runOne(
  router: EventRouter,
  request: Omit<NativeRequest, 'id'>,
  signal: AbortSignal,
): Promise<NativeOutputs> {
  signal.throwIfAborted();
  let unlisten = (): void => undefined;
  try {
    return await new Promise<NativeOutputs>((resolve, reject) => {
      const submitted = router.submit(new PromptRequest(resolve, reject), request);
      const onAbort = (): void => {
        submitted.abort();
        reject(signal.reason);
      };
      signal.addEventListener('abort', onAbort, { once: true });
      unlisten = () => signal.removeEventListener('abort', onAbort);
    });
  } finally {
    unlisten();
  }
}

class PromptRequest implements RequestHandler {
  readonly startedAt: number = performance.now();
  readonly hasStopped = false;
  readonly #resolve: (outputs: NativeOutputs) => void;
  readonly #reject: (reason: unknown) => void;

  constructor(resolve: (outputs: NativeOutputs) => void, reject: (reason: unknown) => void) {
    this.#resolve = resolve;
    this.#reject = reject;
  }

  submitted(): void {}

  accept(event: NativeEvent): boolean {
    if (event.finishReason === undefined) return false;
    if (event.outputs !== undefined && event.finishReason === 'length') {
      this.#resolve(event.outputs);
    } else {
      const code = nativeErrorCode(event.errorCode) ?? 'ERR_TM_INTERNAL';
      const message = event.errorMessage ?? `the engine ended it: ${event.finishReason}`;
      this.#reject(new TurbomindError(code, message));
    }
    return true;
  }

  edit(): Float32Array {
    throw new TurbomindError('ERR_TM_INTERNAL', 'logits of a request that edits none');
  }

  failWith(error: TurbomindError): void {
    this.#reject(fromNative(error));
  }

  reject(reason: unknown): void {
    this.#reject(reason);
  }
}
