// Messages between a pipeline and its grammar workers. Types only.

/** UTF-8 bytes of all tokens one behind the other; empty for tokens that no grammar may draw. */
export interface Vocabulary {
  readonly bytes: Uint8Array;
  /** [vocabSize + 1]: where each token begins. */
  readonly offsets: Uint32Array;
}

/** Starts a worker: its workerData. */
export interface WorkerStart {
  readonly vocabulary: Vocabulary;
  /** Path of the matcher's module. */
  readonly matcher: string;
}

export type ToWorker =
  | {
      readonly type: 'open';
      readonly session: number;
      readonly ebnf: string;
      readonly isForeign: boolean;
      /** Tokens that end the answer where the grammar may end. */
      readonly stopIds: readonly number[];
      /** Where masks are written, [ceil(vocabSize / 32)] words. */
      readonly mask: SharedArrayBuffer;
      /** Tokens drawn before: a session of a worker that was lost. */
      readonly accepted: readonly number[];
    }
  | { readonly type: 'advance'; readonly steps: readonly SessionStep[] }
  | { readonly type: 'close'; readonly session: number };

export interface SessionStep {
  readonly session: number;
  readonly tokens: readonly number[];
}

/** What became of a session's step. */
export type MaskStatus =
  /** The mask for the next token lies in the session's buffer. */
  | 'ready'
  /** The grammar has ended with its stop token. */
  | 'ended'
  /** No token of the vocabulary can go on: the grammar needs a byte that no token spells. */
  | 'stuck'
  /** The token drawn was not allowed. */
  | 'rejected';

export type FromWorker =
  /** A grammar that is not in the cache is being compiled for the session. */
  | { readonly type: 'compiling'; readonly session: number }
  | {
      readonly type: 'masks';
      readonly results: readonly { readonly session: number; readonly status: MaskStatus }[];
    }
  | { readonly type: 'refused'; readonly session: number; readonly reason: string }
  /** The matcher gave up: the worker is of no use any more. */
  | { readonly type: 'broken'; readonly session: number; readonly reason: string };
