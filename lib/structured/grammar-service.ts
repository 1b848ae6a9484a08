// A pipeline's grammars: starts grammar workers, shares sessions out over them, and carries tokens
// there and masks back. A worker that is lost (a grammar that takes too long, a matcher that gives
// up) is replaced, and its other sessions go on from the tokens they have drawn. Runs on the JS
// thread, which never waits: compiling and masks are the workers' work.
import { setImmediate as nextTurn } from 'node:timers/promises';
import { TurbomindError } from '../errors.js';
import type { Tokenizer } from '../tokenizer.js';
import type { FromWorker, MaskStatus, SessionStep, ToWorker, Vocabulary } from './protocol.js';
import type { GrammarSource } from './response-format.js';

/** A worker's thread, or a stand-in of tests. */
export interface WorkerPort {
  post(message: ToWorker): void;
  /** Whether the process waits for it. */
  hold(isHeld: boolean): void;
  terminate(): Promise<unknown>;
}

export interface WorkerHandlers {
  message(message: FromWorker): void;
  /** The thread has ended by itself. */
  lost(reason: string): void;
}

export type StartWorker = (vocabulary: Vocabulary, handlers: WorkerHandlers) => WorkerPort;

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

/** A second worker compiles while the first one serves answers that run. */
const MOST_WORKERS = 2;
const COMPILE_LIMIT_MS = 120_000;
/** A worker that breaks this often under one session is not replaced for it again. */
const MOST_RETRIES = 2;
/** The vocabulary is read in slices of this length, with turns of the event loop between. */
const SLICE_MS = 4;

type Settle = {
  readonly onMask: (mask: Uint32Array) => void;
  readonly onError: (error: TurbomindError) => void;
};

class Session implements GrammarSession {
  readonly id: number;
  readonly source: GrammarSource;
  readonly stopIds: readonly number[];
  readonly buffer: SharedArrayBuffer;
  readonly mask: Uint32Array;
  readonly drawn: number[] = [];
  slot: Slot;
  waiting: Settle | undefined;
  numRetries = 0;
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
    this.drawn.push(...tokens);
    this.waiting = { onMask, onError };
    this.slot.step({ session: this.id, tokens });
  }

  close(): void {
    this.#onClose(this);
  }
}

/** One worker and the sessions that it serves. */
class Slot {
  readonly sessions = new Map<number, Session>();
  readonly grammars = new Set<string>();
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

export interface GrammarServiceParts {
  readonly tokenizer: Tokenizer;
  readonly vocabSize: number;
  readonly startWorker: StartWorker;
  readonly compileLimitMs?: number;
}

export class GrammarService {
  readonly #parts: GrammarServiceParts;
  readonly #slots: Slot[] = [];
  #vocabulary: Promise<Vocabulary> | undefined;
  #lastId = 0;
  #isClosed = false;

  constructor(parts: GrammarServiceParts) {
    this.#parts = parts;
  }

  get numSessions(): number {
    return this.#slots.reduce((sum, { sessions }) => sum + sessions.size, 0);
  }

  /**
   * Compiles the grammar, or finds it compiled, and computes the first token's mask.
   * @throws TurbomindError ERR_TM_INVALID_OPTION when the grammar cannot be used.
   */
  async open(source: GrammarSource, stopIds: readonly number[]): Promise<GrammarSession> {
    this.#vocabulary ??= readVocabulary(this.#parts.tokenizer, this.#parts.vocabSize);
    const vocabulary = await this.#vocabulary;
    if (this.#isClosed) throw closed();
    const slot = this.#chooseSlot(source, vocabulary);
    this.#lastId += 1;
    const numWords = Math.ceil(this.#parts.vocabSize / 32);
    const session = new Session(this.#lastId, source, stopIds, numWords, slot, (ended) => {
      this.#end(ended);
    });
    return await new Promise((resolve, reject) => {
      session.waiting = {
        onMask: () => resolve(session),
        onError: (error) => {
          session.close();
          reject(error);
        },
      };
      slot.sessions.set(session.id, session);
      slot.open(session);
    });
  }

  /** Ends the workers; sessions that wait for a mask fail. */
  async close(): Promise<void> {
    this.#isClosed = true;
    const slots = this.#slots.splice(0);
    for (const slot of slots) {
      clearTimeout(slot.compiling?.timer);
      for (const session of [...slot.sessions.values()]) take(session)?.onError(closed());
    }
    await Promise.all(slots.map(({ port }) => port.terminate()));
  }

  // The worker that knows the grammar, else an idle one, else a new one, else the least busy.
  #chooseSlot(source: GrammarSource, vocabulary: Vocabulary): Slot {
    const known = this.#slots.find(({ grammars }) => grammars.has(source.ebnf));
    if (known !== undefined) return known;
    const idle = this.#slots.find(({ sessions }) => sessions.size === 0);
    if (idle !== undefined) return idle;
    if (this.#slots.length < MOST_WORKERS) return this.#addSlot(vocabulary);
    return this.#slots.reduce((best, slot) => {
      return slot.sessions.size < best.sessions.size ? slot : best;
    });
  }

  #addSlot(vocabulary: Vocabulary): Slot {
    const slot = new Slot(vocabulary, (each) => this.#start(each));
    this.#slots.push(slot);
    return slot;
  }

  #start(slot: Slot): WorkerPort {
    const port: WorkerPort = this.#parts.startWorker(slot.vocabulary, {
      message: (message) => {
        if (slot.port === port) this.#receive(slot, message);
      },
      lost: (reason) => {
        if (slot.port === port) this.#replace(slot, undefined, reason);
      },
    });
    return port;
  }

  #receive(slot: Slot, message: FromWorker): void {
    switch (message.type) {
      case 'compiling':
        this.#watch(slot, message.session);
        break;
      case 'masks':
        for (const { session, status } of message.results) this.#settle(slot, session, status);
        slot.hold();
        break;
      case 'refused':
        this.#refuse(slot, message.session, message.reason);
        slot.hold();
        break;
      case 'broken':
        this.#replace(slot, message.session, message.reason);
        break;
    }
  }

  #refuse(slot: Slot, id: number, reason: string): void {
    const session = slot.sessions.get(id);
    if (session === undefined) return;
    slot.grammars.delete(session.source.ebnf);
    take(session)?.onError(refusal(reason));
  }

  #settle(slot: Slot, id: number, status: MaskStatus): void {
    this.#unwatch(slot, id);
    const session = slot.sessions.get(id);
    const waiting = session && take(session);
    if (session === undefined || waiting === undefined) return;
    if (status === 'ready') waiting.onMask(session.mask);
    else if (status === 'stuck') waiting.onError(stuck());
    else if (status === 'rejected') {
      const token = session.drawn.at(-1);
      waiting.onError(internal(`the grammar does not allow the token ${token} that was drawn`));
    }
  }

  #watch(slot: Slot, session: number): void {
    const limit = this.#parts.compileLimitMs ?? COMPILE_LIMIT_MS;
    const timer = setTimeout(() => {
      const reason = `takes more than ${limit / 1000} s to compile; lower its repetitions`;
      this.#refuse(slot, session, reason);
      this.#replace(slot, session, reason);
    }, limit);
    timer.unref();
    slot.compiling = { session, timer };
  }

  #unwatch(slot: Slot, session: number): void {
    if (slot.compiling?.session !== session) return;
    clearTimeout(slot.compiling.timer);
    slot.compiling = undefined;
  }

  // The session that broke the worker fails; the others go on in a new one.
  #replace(slot: Slot, culprit: number | undefined, reason: string): void {
    if (this.#isClosed) return;
    clearTimeout(slot.compiling?.timer);
    slot.compiling = undefined;
    void slot.port.terminate();
    slot.port = this.#start(slot);
    slot.dropSteps();
    slot.grammars.clear();
    for (const session of [...slot.sessions.values()]) {
      session.numRetries += 1;
      if (session.id === culprit || session.numRetries > MOST_RETRIES) {
        const waiting = take(session);
        slot.sessions.delete(session.id);
        waiting?.onError(internal(`the grammar matcher gave up: ${reason}`));
      } else {
        slot.open(session);
      }
    }
  }

  #end(session: Session): void {
    const { slot } = session;
    session.waiting = undefined;
    if (!slot.sessions.delete(session.id) || this.#isClosed) return;
    slot.port.post({ type: 'close', session: session.id });
    slot.hold();
  }
}

function take(session: Session): Settle | undefined {
  const { waiting } = session;
  session.waiting = undefined;
  return waiting;
}

/**
 * Bytes of all tokens a grammar may draw: not special ones, not those that end an answer. Reading
 * 150 thousand tokens takes 0.1 s, so the event loop gets its turns in between.
 */
export async function readVocabulary(tokenizer: Tokenizer, vocabSize: number): Promise<Vocabulary> {
  const stops = new Set(tokenizer.eosIds);
  const numTokens = Math.min(vocabSize, tokenizer.vocabSize);
  const offsets = new Uint32Array(vocabSize + 1);
  const tokens: Uint8Array[] = [];
  let end = 0;
  let started = performance.now();
  for (let id = 0; id < numTokens; id += 1) {
    if (!stops.has(id) && !tokenizer.isSpecial(id)) {
      const token = tokenizer.bytesOf(id);
      tokens.push(token);
      end += token.length;
    }
    offsets[id + 1] = end;
    if (performance.now() - started < SLICE_MS) continue;
    await nextTurn();
    started = performance.now();
  }
  offsets.fill(end, numTokens + 1);
  return { bytes: Buffer.concat(tokens), offsets };
}

function refusal(reason: string): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_OPTION', `responseFormat: the grammar ${reason}`);
}

function stuck(): TurbomindError {
  return new TurbomindError(
    'ERR_TM_INVALID_OPTION',
    'responseFormat: no token of this model can go on; its vocabulary lacks a character that the ' +
      'grammar needs',
  );
}

function internal(message: string): TurbomindError {
  return new TurbomindError('ERR_TM_INTERNAL', `responseFormat: ${message}`);
}

function closed(): TurbomindError {
  return new TurbomindError('ERR_TM_DISPOSED', 'the pipeline was closed');
}
