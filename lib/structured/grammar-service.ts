// A pipeline's grammars: starts grammar workers, shares sessions out over them, and carries tokens
// there and masks back. A worker that is lost (a grammar that takes too long, a matcher that gives
// up) is replaced, and its other sessions go on from the tokens they have drawn. Runs on the JS
// thread, which never waits: compiling and masks are the workers' work.
import { TurbomindError } from '../errors.js';
import type { Tokenizer } from '../tokenizer.js';
import { type GrammarSession, Session, Slot } from './grammar-session.js';
import type { FromWorker, MaskStatus, Vocabulary } from './protocol.js';
import type { GrammarSource } from './response-format.js';
import { readVocabulary } from './vocabulary.js';
import type { StartWorker, WorkerPort } from './worker-port.js';

/** A second worker compiles while the first one serves answers that run. */
const MOST_WORKERS = 2;
const COMPILE_LIMIT_MS = 120_000;
/** A worker that is lost this often before one session gets a mask is not replaced for it again. */
const MOST_RETRIES = 2;

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
      for (const session of [...slot.sessions.values()]) session.take()?.onError(closed());
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
    session.take()?.onError(refusal(reason));
  }

  #settle(slot: Slot, id: number, status: MaskStatus): void {
    this.#unwatch(slot, id);
    const session = slot.sessions.get(id);
    if (session === undefined) return;
    if (status === 'ready') session.numRetries = 0;
    const waiting = session.take();
    if (waiting === undefined) return;
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
    if (this.#isClosed || !this.#slots.includes(slot)) return;
    clearTimeout(slot.compiling?.timer);
    slot.compiling = undefined;
    slot.dropSteps();
    void slot.port.terminate();
    try {
      slot.port = this.#start(slot);
    } catch (error) {
      this.#drop(slot, error);
      return;
    }
    slot.grammars.clear();
    for (const session of [...slot.sessions.values()]) {
      session.numRetries += 1;
      if (session.id === culprit || session.numRetries > MOST_RETRIES) {
        slot.sessions.delete(session.id);
        session.fail(internal(`the grammar matcher gave up: ${reason}`));
      } else {
        slot.open(session);
      }
    }
  }

  // Nothing serves its sessions any more; the next answer tries to start a worker again.
  #drop(slot: Slot, error: unknown): void {
    this.#slots.splice(this.#slots.indexOf(slot), 1);
    const reason = error instanceof Error ? error.message : String(error);
    const sessions = [...slot.sessions.values()];
    slot.sessions.clear();
    for (const session of sessions) session.fail(internal(`no worker can be started: ${reason}`));
  }

  #end(session: Session): void {
    const { slot } = session;
    session.waiting = undefined;
    if (!slot.sessions.delete(session.id) || this.#isClosed) return;
    slot.port.post({ type: 'close', session: session.id });
    slot.hold();
  }
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
