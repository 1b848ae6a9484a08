// What users can set of an answer, with meanings and defaults, and the same with defaults filled in.
// Types only; what values are allowed is generation-rules.ts's, the defaults are put in by
// resolve-generation.ts.
import type { NativeSampling } from '../native-types.js';
import type { GrammarSource, ResponseFormat } from '../structured/response-format.js';
import type { TilingOptions } from './tiling.js';

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

/** GenerationOptions with defaults filled in; how tokens are drawn as the engine is told, in text not ids. */
export interface ResolvedGenerationOptions extends Omit<NativeSampling, 'badWords'> {
  readonly maxNewTokens: number | null;
  readonly minNewTokens: number;
  readonly priority: number;
  /** 0: none. */
  readonly queueTimeoutMs: number;
  readonly stopWords: readonly string[];
  readonly stopTokenIds: readonly number[];
  readonly badWords: readonly string[];
  /** What the answer is held to; undefined: nothing. */
  readonly grammar: GrammarSource | undefined;
  readonly ignoreEos: boolean;
  readonly skipSpecialTokens: boolean;
  /** Of `numLogprobs`, how many are listed. */
  readonly numTopLogprobs: number;
  readonly n: number;
  readonly outputLogits: OutputRange;
  readonly outputLastHiddenState: OutputRange;
  readonly logitsProcessors: readonly LogitsProcessor[];
  readonly tiling: TilingOptions;
  readonly tileBudget: number | undefined;
  readonly signal: AbortSignal | undefined;
}
