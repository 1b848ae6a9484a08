// Every option users can set: types, defaults, checks. LMDeploy's names in camelCase and
// LMDeploy's defaults: sampling settings in a model's generation_config.json are not taken over
// (its end-of-sequence ids are). No option is accepted and ignored. Pure functions.
import { randomBytes } from 'node:crypto';
import * as check from './check.js';
import type { Device } from './device.js';
import { TurbomindError } from './errors.js';
import {
  type GrammarSource,
  type ResponseFormat,
  readResponseFormat,
} from './structured/response-format.js';
import type { Tokenizer } from './tokenizer.js';

/** Limits of pictures named by URL. */
export interface ImageFetchOptions {
  /** Whole download, redirects included, in ms. Defaults to 30000. */
  readonly timeoutMs?: number | undefined;
  /** Encoded bytes of one picture, from wherever it comes. Defaults to 64 MiB. */
  readonly maxBytes?: number | undefined;
}

/** LMDeploy's `quant_policy`. */
export type QuantPolicy = 0 | 4 | 8;

/** Speculative decoding. It never changes results, only the time they take. */
export interface SpeculativeConfig {
  /**
   * 'ngram': what followed the last tokens when they stood in the prompt or completion before is
   * guessed to follow again, and guesses are checked several in a step, as many as have been found
   * to pay. 'none': one token a step.
   */
  readonly method: 'ngram' | 'none';
  /** Most guesses of a sequence in a step, 1 to 7; 'ngram' only. Defaults to 7. */
  readonly numSpeculativeTokens?: number | undefined;
}

/** Settings of a pipeline: its device, its memory and how pictures are cut. */
export interface PipelineOptions {
  /** 'auto' | 'cpu' | 'cuda' | 'cuda:N'. Defaults to 'auto'. */
  readonly device?: Device | undefined;
  /**
   * What activations and the KV cache are kept in on a GPU: 'auto' takes the checkpoint's own type
   * (bfloat16 where it has any such tensor, else float16). The CPU computes in float32: there
   * anything but 'auto' is refused. Defaults to 'auto'.
   */
  readonly dtype?: 'auto' | 'float16' | 'bfloat16' | undefined;
  /** CPU threads. Defaults to 0: as many as the process may use. */
  readonly threads?: number | undefined;
  /** Most tokens of prompt and completion together. Defaults to what the model was made for. */
  readonly sessionLen?: number | undefined;
  /** Most sequences in one step. Defaults to 128. */
  readonly maxBatchSize?: number | undefined;
  /** Most prompt tokens in one step. Defaults to 512 on the CPU, 8192 on a GPU. */
  readonly maxPrefillTokenNum?: number | undefined;
  /**
   * Share of the memory that weights and buffers leave free which the KV cache may take, up to 1;
   * 'auto': 0.9 on a GPU, half on the CPU. Never more than `maxBatchSize` full sessions. Defaults
   * to 0.8 on a GPU and to 0.5 on the CPU, whose memory others use too.
   */
  readonly cacheMaxEntryCount?: number | 'auto' | undefined;
  /** Bytes of the KV cache, down to whole blocks, instead of `cacheMaxEntryCount`. */
  readonly kvCacheBytes?: number | undefined;
  /** Bytes of everything on the device, instead of `cacheMaxEntryCount`. */
  readonly memoryBudgetBytes?: number | undefined;
  /**
   * Bytes of host memory that preempted requests may keep their KV blocks in, where copying them there
   * and back is cheaper than computing them again; 0: none. Taken at load. Defaults to 1 GiB, at most a
   * tenth of the free host memory, on a GPU; to 0 on the CPU, where the same bytes serve better as cache.
   */
  readonly swapSpaceBytes?: number | undefined;
  /** Tokens in a KV block. 64 is the only size implemented. */
  readonly cacheBlockSeqLen?: number | undefined;
  /**
   * Bits of a KV cache entry, 8 or 4, quantised per token and head; 0: not quantised (16 bit on a
   * GPU, 32 on the CPU). Defaults to 0.
   */
  readonly quantPolicy?: QuantPolicy | undefined;
  /**
   * Keeps what was computed of prompts and answers, as long as there is room, and does not compute
   * it again for requests that begin alike, pictures included. Results do not change. Defaults to true.
   */
  readonly enablePrefixCaching?: boolean | undefined;
  /** Requests that may wait for their first step; more are refused. Defaults to no limit. */
  readonly maxQueueSize?: number | undefined;
  /**
   * Goal for the time between the tokens of running streams, in ms: prompts are then computed in
   * smaller parts, at least 16 tokens a step. Defaults to none.
   */
  readonly maxInterTokenLatencyMs?: number | undefined;
  /** Defaults to `{ method: 'ngram' }` on the CPU and `{ method: 'none' }` on a GPU. */
  readonly speculativeConfig?: SpeculativeConfig | undefined;
  /** Devices a model is split over: 1 is the only number implemented. */
  readonly tp?: number | undefined;
  /** Fewest tiles of a picture's grid. Defaults to the model's own. */
  readonly minDynamicPatch?: number | undefined;
  /** Most tiles of a picture's grid, thumbnail not counted. Defaults to the model's own. */
  readonly maxDynamicPatch?: number | undefined;
  /** Whether a grid of several tiles gets the whole picture as one more. Defaults to the model's own. */
  readonly useThumbnail?: boolean | undefined;
  /** Most pixels of a picture, before any resize. Defaults to 100 million. */
  readonly maxImagePixels?: number | undefined;
  /** Limits of pictures named by URL. */
  readonly imageFetch?: ImageFetchOptions | undefined;
  /** A tokenizer to use instead of the folder's tokenizer.json. */
  readonly tokenizer?: Tokenizer | undefined;
  /** A Jinja chat template to use instead of the model's own. */
  readonly chatTemplate?: string | undefined;
  /** Aborts the loading: `pipeline()` rejects with `signal.reason`. */
  readonly signal?: AbortSignal | undefined;
  /** Gets the loaded share of the weights, 0..1. */
  readonly onProgress?: ((share: number) => void) | undefined;
  /** Caps the instruction set of the CPU kernels, for diagnosis. Results agree up to rounding. */
  readonly cpuIsa?: 'scalar' | 'avx2' | 'avx512' | 'amx' | undefined;
}

/** Token id → what is added to its score. */
export type LogitBias = Readonly<Record<number, number>> | ReadonlyMap<number, number>;

/** Positions whose logits or hidden states are wanted. */
export type OutputRange = 'none' | 'generation' | 'all';

/**
 * Changes the scores that the next token is drawn from. `ids`: prompt and completion so far. `logits`
 * may be changed in place, or others of the same length returned. It runs on the JS thread between
 * two tokens, so it must be quick, and cannot wait.
 */
export type LogitsProcessor = (
  ids: Int32Array,
  logits: Float32Array,
  // biome-ignore lint/suspicious/noConfusingVoidType: changing them in place returns nothing
) => Float32Array | void;

/** How one prompt, or one batch, is answered. */
export interface GenerationOptions {
  /** Most tokens of a completion; null: as many as the session holds. Defaults to 512. */
  readonly maxNewTokens?: number | null | undefined;
  /** Tokens before an end-of-sequence or stop id may end it. Defaults to 0. */
  readonly minNewTokens?: number | undefined;
  /**
   * Higher goes first, -100 to 100. A level is worth 10 s of waiting, so that nobody waits for ever.
   * Defaults to 0.
   */
  readonly priority?: number | undefined;
  /** Longest wait in the engine before the first step, in ms; ERR_TM_DEADLINE after it. Defaults to none. */
  readonly queueTimeoutMs?: number | undefined;
  /** Draws tokens at random instead of taking the best one. Defaults to false. */
  readonly doSample?: boolean | undefined;
  /** 0 to 2; needs doSample, except 0, which is greedy. Defaults to 0.8. */
  readonly temperature?: number | undefined;
  /** Draws among this many best tokens; 0: no limit. Needs doSample. Defaults to 50. */
  readonly topK?: number | undefined;
  /** Draws among the best tokens of this joint probability. Needs doSample. Defaults to 1. */
  readonly topP?: number | undefined;
  /** Leaves out tokens below this share of the best one's probability. Needs doSample. Defaults to 0. */
  readonly minP?: number | undefined;
  /** Divides the scores of tokens seen in prompt and completion, greedy too. Defaults to 1. */
  readonly repetitionPenalty?: number | undefined;
  /**
   * Subtracted from a token's score for each time the completion holds it, greedy too; OpenAI's
   * formula. -2 to 2. Defaults to 0.
   */
  readonly frequencyPenalty?: number | undefined;
  /** Subtracted once from the score of every token that the completion holds. -2 to 2. Defaults to 0. */
  readonly presencePenalty?: number | undefined;
  /**
   * Added to the scores of these token ids, after the penalties, greedy too; -100 to 100. 100 as
   * good as forces a token, -100 as good as bans it. `badWords` ban for certain.
   */
  readonly logitBias?: LogitBias | undefined;
  /** 64-bit seed of the draws. Needs doSample. Defaults to a random one. */
  readonly randomSeed?: number | bigint | undefined;
  /** Texts that end a completion; they and what follows are left out of `text`. */
  readonly stopWords?: readonly string[] | undefined;
  /** Token ids that end a completion, beside the model's own. */
  readonly stopTokenIds?: readonly number[] | undefined;
  /** Texts that may not be generated. */
  readonly badWords?: readonly string[] | undefined;
  /**
   * The shape of the answer: JSON under a schema, a regular expression, a grammar or a choice. Only
   * tokens that keep it can be drawn; an answer that ends by length or by a stop word may be cut
   * short. Defaults to none.
   */
  readonly responseFormat?: ResponseFormat | undefined;
  /** Goes on past the model's end-of-sequence ids. Defaults to false. */
  readonly ignoreEos?: boolean | undefined;
  /** Leaves special tokens out of `text`. Defaults to true. */
  readonly skipSpecialTokens?: boolean | undefined;
  /** Log probabilities of this many best tokens at each position; true: 1. Defaults to none. */
  readonly logprobs?: number | boolean | undefined;
  /**
   * OpenAI's name for the number of best tokens; with it, `logprobs` may be true or left out. 0 with
   * `logprobs: true`: the chosen token's log probability only.
   */
  readonly topLogprobs?: number | undefined;
  /** Answers to each prompt, which share its computation; above 1 needs doSample. Defaults to 1. */
  readonly n?: number | undefined;
  /**
   * Keeps the model's scores of every token: 'generation' for the tokens of the completion, 'all'
   * for those of the prompt too. At most 1 GiB a request. Defaults to none.
   */
  readonly outputLogits?: 'generation' | 'all' | undefined;
  /** Keeps the hidden states that those scores are made of. Defaults to none. */
  readonly outputLastHiddenState?: 'generation' | 'all' | undefined;
  /**
   * Changes the scores of each token before it is drawn, one function after the other. Clearly
   * slower: every token's scores travel to JavaScript and back. Penalties, biases and bans come
   * after it; `logprobs` are those of what it leaves. An exception ends its own request.
   */
  readonly logitsProcessor?: LogitsProcessor | readonly LogitsProcessor[] | undefined;
  /** Fewest tiles of a picture's grid. Defaults to the pipeline's. */
  readonly minDynamicPatch?: number | undefined;
  /** Most tiles of a picture's grid. Defaults to the pipeline's. */
  readonly maxDynamicPatch?: number | undefined;
  /** Whether a grid of several tiles gets a thumbnail. Defaults to the pipeline's. */
  readonly useThumbnail?: boolean | undefined;
  /** Tiles of all the pictures of a prompt together, thumbnails not counted, shared out evenly. */
  readonly maxTiles?: number | undefined;
  /** Aborts the request: the call rejects with `signal.reason`. */
  readonly signal?: AbortSignal | undefined;
}

/** How a prompt is prepared when nothing is generated: of `GenerationOptions`, what pictures are cut by. */
export type PromptOptions = Pick<
  GenerationOptions,
  'minDynamicPatch' | 'maxDynamicPatch' | 'useThumbnail' | 'maxTiles' | 'signal'
>;

/** PipelineOptions with defaults filled in; what the model decides is left open. */
export interface ResolvedPipelineOptions {
  readonly device: Device;
  readonly dtype: 'auto' | 'float16' | 'bfloat16';
  readonly threads: number;
  readonly sessionLen: number;
  readonly maxBatchSize: number;
  /** undefined: what suits the device. */
  readonly maxPrefillTokenNum: number | undefined;
  /** 0: 'auto'; undefined: what suits the device. */
  readonly cacheMaxEntryCount: number | undefined;
  /** 0: not given. */
  readonly kvCacheBytes: number;
  /** 0: not given. */
  readonly memoryBudgetBytes: number;
  /** -1: what suits the device. */
  readonly swapSpaceBytes: number;
  readonly enablePrefixCaching: boolean;
  /** 0: no limit. */
  readonly maxQueueSize: number;
  /** 0: none. */
  readonly maxInterTokenLatencyMs: number;
  readonly quantPolicy: QuantPolicy;
  readonly blockSize: number;
  /** 0: no speculation; undefined: what suits the device. */
  readonly numSpeculativeTokens: number | undefined;
  readonly tiling: TilingOptions;
  readonly maxImagePixels: number;
  readonly fetchTimeoutMs: number;
  readonly maxImageBytes: number;
  readonly tokenizer: Tokenizer | undefined;
  readonly chatTemplate: string | undefined;
  readonly signal: AbortSignal | undefined;
  readonly onProgress: ((share: number) => void) | undefined;
  readonly cpuIsa: string;
}

/** How pictures are cut; undefined: the model's own. */
export interface TilingOptions {
  readonly minTiles: number | undefined;
  readonly maxTiles: number | undefined;
  readonly useThumbnail: boolean | undefined;
}

/** GenerationOptions with defaults filled in. */
export interface ResolvedGenerationOptions {
  readonly maxNewTokens: number | null;
  readonly minNewTokens: number;
  readonly priority: number;
  /** 0: none. */
  readonly queueTimeoutMs: number;
  readonly doSample: boolean;
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly repetitionPenalty: number;
  readonly frequencyPenalty: number;
  readonly presencePenalty: number;
  readonly logitBias: readonly (readonly [token: number, bias: number])[];
  readonly seed: bigint;
  readonly stopWords: readonly string[];
  readonly stopTokenIds: readonly number[];
  readonly badWords: readonly string[];
  /** What the answer is held to; undefined: nothing. */
  readonly grammar: GrammarSource | undefined;
  readonly ignoreEos: boolean;
  readonly skipSpecialTokens: boolean;
  /** Asked of the engine; 0: none. */
  readonly numLogprobs: number;
  /** Of these, how many are listed. */
  readonly numTopLogprobs: number;
  readonly n: number;
  readonly outputLogits: OutputRange;
  readonly outputLastHiddenState: OutputRange;
  readonly logitsProcessors: readonly LogitsProcessor[];
  readonly tiling: TilingOptions;
  readonly tileBudget: number | undefined;
  readonly signal: AbortSignal | undefined;
}

const MAX_SEED = 2n ** 64n - 1n;
const MAX_INT32 = 2 ** 31 - 1;
const MAX_TILES = 1024;

const device: check.Rule = (value) =>
  typeof value === 'string' && /^(auto|cpu|cuda|cuda:\d{1,3})$/.test(value)
    ? undefined
    : "'auto', 'cpu', 'cuda' or 'cuda:N'";

const imageFetch: check.Rule = (value) => {
  check.checkOptions<ImageFetchOptions>('imageFetch', value, {
    timeoutMs: check.integer(1, MAX_INT32),
    maxBytes: check.integer(1, 2 ** 32),
  });
  return undefined;
};

const MAX_SPECULATIVE_TOKENS = 7;

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
  return Array.isArray(Reflect.get(value, 'eosIds'))
    ? undefined
    : `${expected}, with a list eosIds`;
};

const PIPELINE_RULES: check.Rules<PipelineOptions> = {
  device,
  dtype: check.oneOf('auto', 'float16', 'bfloat16'),
  threads: check.integer(0, 1024),
  sessionLen: check.integer(1, MAX_INT32),
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
  maxQueueSize: check.integer(1, MAX_INT32),
  maxInterTokenLatencyMs: check.number('above 0', (value) => value > 0),
  quantPolicy: (value) =>
    value === 0 || value === 4 || value === 8 ? undefined : '0 (not quantised), 8 or 4 bits',
  speculativeConfig,
  tp: check.exactly(1, '1: splitting a model over devices is not implemented'),
  minDynamicPatch: check.integer(1, MAX_TILES),
  maxDynamicPatch: check.integer(1, MAX_TILES),
  useThumbnail: check.boolean,
  maxImagePixels: check.integer(1, 2 ** 32),
  imageFetch,
  tokenizer,
  chatTemplate: check.text,
  signal: check.abortSignal,
  onProgress: check.callback,
  cpuIsa: check.oneOf('scalar', 'avx2', 'avx512', 'amx'),
};

const seed: check.Rule = (value) =>
  (typeof value === 'bigint' && value >= 0n && value <= MAX_SEED) ||
  (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0)
    ? undefined
    : 'an integer from 0 to 2 ** 64 - 1 (a bigint above 2 ** 53)';

const penalty = check.number('from -2 to 2', (value) => value >= -2 && value <= 2);

const MAX_BIASES = 2 ** 16;

const logitBias: check.Rule = (value) => {
  const expected = 'token ids with a bias from -100 to 100 each, as an object or a Map';
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return expected;
  const entries: readonly (readonly [unknown, unknown])[] = [
    ...(value instanceof Map ? value : Object.entries(value)),
  ];
  if (entries.length > MAX_BIASES) return `at most ${MAX_BIASES} token ids`;
  const isRight = ([id, bias]: readonly [unknown, unknown]): boolean =>
    /^\d{1,10}$/.test(String(id)) &&
    Number(id) <= MAX_INT32 &&
    typeof bias === 'number' &&
    bias >= -100 &&
    bias <= 100;
  const wrong = entries.find((entry) => !isRight(entry));
  return wrong === undefined
    ? undefined
    : `${expected}; ${String(wrong[0])} has ${String(wrong[1])}`;
};

const PROMPT_RULES: check.Rules<PromptOptions> = {
  minDynamicPatch: check.integer(1, MAX_TILES),
  maxDynamicPatch: check.integer(1, MAX_TILES),
  useThumbnail: check.boolean,
  maxTiles: check.integer(1, 2 ** 16),
  signal: check.abortSignal,
};

const GENERATION_RULES: check.Rules<GenerationOptions> = {
  maxNewTokens: check.either(
    check.integer(1, MAX_INT32),
    check.exactly(null, 'null to fill the session'),
  ),
  minNewTokens: check.integer(0, MAX_INT32),
  priority: check.integer(-100, 100),
  queueTimeoutMs: check.number('above 0', (value) => value > 0),
  doSample: check.boolean,
  temperature: check.number('from 0 to 2', (value) => value >= 0 && value <= 2),
  topK: check.integer(0, MAX_INT32),
  topP: check.number('above 0 and at most 1', (value) => value > 0 && value <= 1),
  minP: check.number('from 0 to below 1', (value) => value >= 0 && value < 1),
  repetitionPenalty: check.number('above 0 and at most 10', (value) => value > 0 && value <= 10),
  frequencyPenalty: penalty,
  presencePenalty: penalty,
  logitBias,
  randomSeed: seed,
  stopWords: check.listOf(check.text, 256),
  stopTokenIds: check.listOf(check.integer(0, MAX_INT32), 1024),
  badWords: check.listOf(check.text, 1024),
  responseFormat: () => undefined, // readResponseFormat's
  ignoreEos: check.boolean,
  skipSpecialTokens: check.boolean,
  logprobs: check.either(check.integer(0, 1024), check.boolean),
  topLogprobs: check.integer(0, 1024),
  n: check.integer(1, 128),
  outputLogits: check.oneOf('generation', 'all'),
  outputLastHiddenState: check.oneOf('generation', 'all'),
  logitsProcessor: check.either(check.callback, check.listOf(check.callback, 64)),
  ...PROMPT_RULES,
};

/** Every option there is, by what takes it. */
export const OPTION_NAMES: {
  readonly pipeline: readonly string[];
  readonly generation: readonly string[];
} = { pipeline: Object.keys(PIPELINE_RULES), generation: Object.keys(GENERATION_RULES) };

/** @throws TurbomindError ERR_TM_INVALID_OPTION */
export function resolvePipelineOptions(options: PipelineOptions = {}): ResolvedPipelineOptions {
  check.checkOptions<PipelineOptions>('pipeline options', options, PIPELINE_RULES);
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

/** @throws TurbomindError ERR_TM_INVALID_OPTION */
export function resolveGenerationOptions(
  options: GenerationOptions = {},
): ResolvedGenerationOptions {
  check.checkOptions<GenerationOptions>('generation options', options, GENERATION_RULES);
  const sampled = options.doSample === true && options.temperature !== 0;
  checkGreedy(options);
  const grammar = resolveGrammar(options);
  const maxNewTokens = options.maxNewTokens === undefined ? 512 : options.maxNewTokens;
  const minNewTokens = options.minNewTokens ?? 0;
  if (maxNewTokens !== null && minNewTokens > maxNewTokens) {
    throw check.invalidOption(
      'minNewTokens',
      minNewTokens,
      `at most maxNewTokens (${maxNewTokens})`,
    );
  }
  return {
    maxNewTokens,
    minNewTokens,
    priority: options.priority ?? 0,
    queueTimeoutMs: options.queueTimeoutMs ?? 0,
    doSample: sampled,
    temperature: sampled ? (options.temperature ?? 0.8) : 1,
    topK: options.topK ?? 50,
    topP: options.topP ?? 1,
    minP: options.minP ?? 0,
    repetitionPenalty: options.repetitionPenalty ?? 1,
    frequencyPenalty: options.frequencyPenalty ?? 0,
    presencePenalty: options.presencePenalty ?? 0,
    logitBias: resolveBias(options.logitBias),
    seed: sampled ? resolveSeed(options.randomSeed) : 0n,
    stopWords: options.stopWords ?? [],
    stopTokenIds: options.stopTokenIds ?? [],
    badWords: options.badWords ?? [],
    grammar,
    ignoreEos: options.ignoreEos ?? false,
    skipSpecialTokens: options.skipSpecialTokens ?? true,
    ...resolveLogprobs(options),
    n: resolveChoices(options.n ?? 1, sampled),
    outputLogits: options.outputLogits ?? 'none',
    outputLastHiddenState: options.outputLastHiddenState ?? 'none',
    logitsProcessors: [options.logitsProcessor ?? []].flat(),
    tiling: resolveTiling(options),
    tileBudget: options.maxTiles,
    signal: options.signal,
  };
}

/**
 * Refuses what would change nothing where no token is drawn.
 * @throws TurbomindError ERR_TM_INVALID_OPTION
 */
export function resolvePromptOptions(options: PromptOptions = {}): ResolvedGenerationOptions {
  check.checkOptions<PromptOptions>('prompt options', options, PROMPT_RULES);
  return resolveGenerationOptions(options);
}

// An entry of 0 changes nothing; without it a row keeps its fast path.
function resolveBias(bias: LogitBias = {}): ResolvedGenerationOptions['logitBias'] {
  const entries: Iterable<readonly [number | string, number]> =
    bias instanceof Map ? bias : Object.entries(bias);
  return Array.from(entries, ([id, value]) => [Number(id), value] as const).filter(
    ([, value]) => value !== 0,
  );
}

function resolveChoices(n: number, sampled: boolean): number {
  if (n === 1 || sampled) return n;
  const message = `n: ${n} greedy answers are all the same; add doSample: true, or leave n out`;
  throw new TurbomindError('ERR_TM_INVALID_OPTION', message);
}

function resolveLogprobs({
  logprobs,
  topLogprobs,
}: GenerationOptions): Pick<ResolvedGenerationOptions, 'numLogprobs' | 'numTopLogprobs'> {
  if (topLogprobs === undefined) {
    const count = Number(logprobs ?? 0);
    return { numLogprobs: count, numTopLogprobs: count };
  }
  const contradicts =
    typeof logprobs === 'number' ? logprobs !== topLogprobs : !logprobs && logprobs !== undefined;
  if (contradicts && !(logprobs === false && topLogprobs === 0)) {
    throw check.invalidOption('logprobs', logprobs, `true beside topLogprobs: ${topLogprobs}`);
  }
  const isWanted = logprobs === true || topLogprobs > 0;
  return { numLogprobs: isWanted ? Math.max(1, topLogprobs) : 0, numTopLogprobs: topLogprobs };
}

function resolveSpeculation(config: SpeculativeConfig | undefined): number | undefined {
  if (config === undefined) return undefined;
  return config.method === 'none' ? 0 : (config.numSpeculativeTokens ?? MAX_SPECULATIVE_TOKENS);
}

function resolveGrammar(options: GenerationOptions): GrammarSource | undefined {
  const { responseFormat, minNewTokens = 0, ignoreEos = false, stopTokenIds = [] } = options;
  if (responseFormat === undefined) return undefined;
  const grammar = readResponseFormat(responseFormat);
  if (grammar === undefined) return undefined;
  if (minNewTokens > 0) {
    const message = 'minNewTokens: a responseFormat decides where an answer may end; leave it out';
    throw new TurbomindError('ERR_TM_INVALID_OPTION', message);
  }
  if (ignoreEos && stopTokenIds.length === 0) {
    const message = 'ignoreEos: an answer with a responseFormat needs a token to end with';
    throw new TurbomindError('ERR_TM_INVALID_OPTION', `${message}; add stopTokenIds`);
  }
  return grammar;
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

const SAMPLING_ONLY = ['temperature', 'topK', 'topP', 'minP', 'randomSeed'] as const;

// A setting that could change nothing is a mistake of the caller's, and is said so. Temperature 0
// is the usual way to ask for greedy decoding, so it is none.
function checkGreedy(options: GenerationOptions): void {
  if (options.doSample === true) return;
  const useless = SAMPLING_ONLY.find(
    (key) => options[key] !== undefined && !(key === 'temperature' && options[key] === 0),
  );
  if (useless === undefined) return;
  throw new TurbomindError(
    'ERR_TM_INVALID_OPTION',
    `${useless}: has no effect without sampling; add doSample: true, or leave ${useless} out`,
  );
}

function resolveSeed(value: number | bigint | undefined): bigint {
  return value === undefined ? randomBytes(8).readBigUInt64LE() : BigInt(value);
}

function resolveTiling(options: {
  readonly minDynamicPatch?: number | undefined;
  readonly maxDynamicPatch?: number | undefined;
  readonly useThumbnail?: boolean | undefined;
}): TilingOptions {
  const { minDynamicPatch, maxDynamicPatch } = options;
  if (minDynamicPatch !== undefined && maxDynamicPatch !== undefined) {
    if (minDynamicPatch > maxDynamicPatch) {
      const expected = `at most maxDynamicPatch (${maxDynamicPatch})`;
      throw check.invalidOption('minDynamicPatch', minDynamicPatch, expected);
    }
  }
  return {
    minTiles: minDynamicPatch,
    maxTiles: maxDynamicPatch,
    useThumbnail: options.useThumbnail,
  };
}
