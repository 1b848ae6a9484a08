// One answer's grammar session, and one worker with the sessions that it serves: what the service
// keeps on the JS thread of the work that grammar workers do.
import type { TurbomindError } from '../errors.js';
import type { SessionStep, Vocabulary } from './protocol.js';
import type { GrammarSource } from './response-format.js';
import type { WorkerPort } from './worker-port.js';

/** Masks of one answer, from its first token on. */
export interface GrammarSession {
  /** Bit i of word i / 32: token i is allowed next. [ceil(vocabSize / 32)]; valid until `advance`. */
  readonly mask: Uint32Array;
  /** Tokens were drawn. One of the two is called later; neither when the answer has ended. */
  advance(
    tokens: readonly number[],
    onMask: (mask: Uint32Array) => void,
    onError: (error: TurbomindError) => void,
  ): void;
  /** The answer has ended or will not begin. */
  close(): void;
}

type Settle = {
  readonly onMask: (mask: Uint32Array) => void;
  readonly onError: (error: TurbomindError) => void;
};

export class Session implements GrammarSession {
  readonly id: number;
  readonly source: GrammarSource;
  readonly stopIds: readonly number[];
  readonly buffer: SharedArrayBuffer;
  readonly mask: Uint32Array;
  readonly drawn: number[] = [];
  slot: Slot;
  waiting: Settle | undefined;
  /** Times that its worker was lost since it last got a mask. */
  numRetries = 0;
  #failure: TurbomindError | undefined;
  readonly #onClose: (session: Session) => void;

  constructor(
    id: number,
    source: GrammarSource,
    stopIds: readonly number[],
    numWords: number,
    slot: Slot,
    onClose: (session: Session) => void,
  ) {
    this.id = id;
    this.source = source;
    this.stopIds = stopIds;
    this.buffer = new SharedArrayBuffer(numWords * 4);
    this.mask = new Uint32Array(this.buffer);
    this.slot = slot;
    this.#onClose = onClose;
  }

  advance(
    tokens: readonly number[],
    onMask: (mask: Uint32Array) => void,
    onError: (error: TurbomindError) => void,
  ): void {
    if (this.#failure !== undefined) {
      onError(this.#failure);
      return;
    }
    this.drawn.push(...tokens);
    this.waiting = { onMask, onError };
    this.slot.step({ session: this.id, tokens });
  }

  close(): void {
    this.#onClose(this);
  }

  /** It cannot go on: who waits is told, or else who draws the next token. */
  fail(error: TurbomindError): void {
    this.#failure = error;
    this.take()?.onError(error);
  }

  /** Who waits for the next mask, who is then no longer kept. */
  take(): Settle | undefined {
    const { waiting } = this;
    this.waiting = undefined;
    return waiting;
  }
}

/** One worker and the sessions that it serves. */
export class Slot {
  readonly sessions: Map<number, Session> = new Map();
  readonly grammars: Set<string> = new Set();
  readonly vocabulary: Vocabulary;
  port: WorkerPort;
  /** What the worker compiles now, and since when. */
  compiling: { readonly session: number; readonly timer: NodeJS.Timeout } | undefined;
  #steps: SessionStep[] = [];

  constructor(vocabulary: Vocabulary, start: (slot: Slot) => WorkerPort) {
    this.vocabulary = vocabulary;
    this.port = start(this);
  }

  /** The steps of one batch of events travel together. */
  step(step: SessionStep): void {
    if (this.#steps.length === 0) queueMicrotask(() => this.#flush());
    this.#steps.push(step);
  }

  dropSteps(): void {
    this.#steps = [];
  }

  #flush(): void {
    const steps = this.#steps;
    this.#steps = [];
    if (steps.length > 0) this.port.post({ type: 'advance', steps });
  }

  open(session: Session): void {
    this.grammars.add(session.source.ebnf);
    this.port.post({
      type: 'open',
      session: session.id,
      ebnf: session.source.ebnf,
      isForeign: session.source.isForeign,
      stopIds: session.stopIds,
      mask: session.buffer,
      accepted: session.drawn,
    });
    this.hold();
  }

  /** An answer that waits for its first mask keeps the process alive; the engine keeps the others. */
  hold(): void {
    const isHeld = [...this.sessions.values()].some((session) => session.waiting !== undefined);
    this.port.hold(isHeld);
  }
}
