// What a caller gets: whole responses and the parts of a stream. Types only.
import type { TurbomindError } from './errors.js';

/** Why a completion ended. */
export type FinishReason = 'stop' | 'length' | 'abort' | 'error';

/** Log probabilities at one position of a completion. */
export interface TokenLogprobs {
  readonly tokenId: number;
  /** Natural logarithm. */
  readonly logprob: number;
  /** The most probable tokens, best first. */
  readonly topLogprobs: readonly (readonly [tokenId: number, logprob: number])[];
}

/** A matrix, row by row. */
export interface FloatRows {
  /** Row r is data.subarray(r * columns, (r + 1) * columns). */
  readonly data: Float32Array;
  readonly shape: readonly [rows: number, columns: number];
}

/** Where the time of a request went, in ms. */
export interface Timings {
  /** From the call to the engine: pictures, template, tokens, and waiting for these. */
  readonly preprocessMs: number;
  /** In the engine, before its first step. */
  readonly queueMs: number;
  /** Vision tower. */
  readonly visionMs: number;
  /** First step to first token, less the vision tower. */
  readonly prefillMs: number;
  /** From the call to the first token, preprocessing included. */
  readonly firstTokenMs: number;
  /** First token to last token. */
  readonly decodeMs: number;
  /** From the call to the end. */
  readonly totalMs: number;
}

/** The answer to one prompt. */
export interface Response {
  /** Ends before the stop word or the end-of-sequence token. */
  readonly text: string;
  /** All generated tokens, the one that ended it included. */
  readonly tokenIds: readonly number[];
  readonly finishReason: FinishReason;
  /** The stop word, or the stop or end-of-sequence id, that ended it. */
  readonly matchedStop: string | number | undefined;
  /** Tokens of the prompt, those of pictures included. */
  readonly inputTokenLen: number;
  /** Of these, tokens that were found in the cache and not computed. */
  readonly cachedTokens: number;
  /** Length of tokenIds. */
  readonly generateTokenLen: number;
  /** One entry a token, when `logprobs` was asked for. */
  readonly logprobs: readonly TokenLogprobs[] | undefined;
  /**
   * When `outputLogits` was asked for: the model's own scores, [positions, vocabulary size]. The last
   * `generateTokenLen` rows are those that the tokens were drawn from, in order; with 'all' the
   * rows of all prompt tokens but the last come first, each scoring the token after it.
   */
  readonly logits: FloatRows | undefined;
  /**
   * When `outputLastHiddenState` was asked for: what the head read, after the last norm,
   * [positions, hidden size]; the same positions as `logits` has.
   */
  readonly lastHiddenState: FloatRows | undefined;
  readonly timings: Timings;
  /** Place of the prompt in its batch. */
  readonly index: number;
  /** Place of the answer among the `n` of its prompt. */
  readonly choice: number;
  /**
   * With `n` above 1: all answers, of which this response is the first (or, if any failed, the first
   * that did). Not set in streams, where each answer ends with a response of its own.
   */
  readonly choices: readonly Response[] | undefined;
  /** Why this prompt of a batch failed; its finishReason is 'error'. */
  readonly error: TurbomindError | undefined;
}

/** What came since the last part of the same answer. */
export interface StreamPart {
  /** May be '' while a character or a possible stop word is incomplete. */
  readonly text: string;
  readonly tokenIds: readonly number[];
  readonly logprobs: readonly TokenLogprobs[] | undefined;
  /** Place of the prompt in its batch. */
  readonly index: number;
  /** Place of the answer among the `n` of its prompt. */
  readonly choice: number;
  /** Set in an answer's last part. */
  readonly finishReason: FinishReason | undefined;
  /** The whole response, in an answer's last part. */
  readonly response: Response | undefined;
}
