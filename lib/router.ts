// Native events to the requests they belong to, by id. Owns the ids, the abort signals' listeners
// and the answer to "is the engine still open"; carries tokens to the grammars of guided requests
// and masks back. Runs on the JS thread.
import { TurbomindError } from './errors.js';
import { MetricsRecorder, type RequestTrace } from './metrics.js';
import { fromNative } from './native.js';
import type { NativeEngine, NativeEvent, NativeRequest } from './native-types.js';
import type { GrammarSession } from './structured/grammar-session.js';

/** Who is told what becomes of a request. */
export interface RequestHandler {
  /** When the caller called, by performance.now(). */
  readonly startedAt: number;
  /** It wants no more tokens. */
  readonly hasStopped: boolean;
  submitted(promptTokens: Int32Array): void;
  /** Takes in an event; true when it was the last one. */
  accept(event: NativeEvent): boolean;
  /** The logits to draw a token from, given the model's. Throws what ends this request alone. */
  edit(logits: Float32Array): Float32Array;
  failWith(error: TurbomindError): void;
  /** Ends it without a response. */
  reject(reason: unknown): void;
}

/** A submitted request, to abort it. */
export interface Submitted {
  abort(): void;
}

interface Live {
  readonly handler: RequestHandler;
  /** Of a guided request. */
  readonly grammar: GrammarSession | undefined;
  readonly trace: RequestTrace;
}

export class EventRouter {
  readonly metrics: MetricsRecorder = new MetricsRecorder();
  readonly #live = new Map<number, Live>();
  #maskCopy = new Uint32Array();
  #engine: NativeEngine | undefined;
  #isClosed = false;
  #lastId = 0;

  /** Give this to `addon.open`. */
  readonly onEvents = (events: readonly NativeEvent[]): void => {
    const now = performance.now();
    for (const event of events) this.#route(event, now);
  };

  attach(engine: NativeEngine): void {
    this.#engine = engine;
  }

  get numLive(): number {
    return this.#live.size;
  }

  /** The open engine. @throws TurbomindError ERR_TM_DISPOSED */
  get engine(): NativeEngine {
    if (this.#isClosed || this.#engine === undefined) throw disposed();
    return this.#engine;
  }

  /**
   * @param grammar of a guided request: closed when the request ends, whichever way.
   * @throws TurbomindError ERR_TM_DISPOSED
   */
  submit(
    handler: RequestHandler,
    request: Omit<NativeRequest, 'id'>,
    grammar?: GrammarSession,
  ): Submitted {
    this.#lastId += 1;
    const id = this.#lastId;
    try {
      const { engine } = this;
      const trace = this.metrics.submitted(handler.startedAt, request.promptTokens.length);
      this.#live.set(id, { handler, grammar, trace });
      handler.submitted(request.promptTokens);
      engine.submit({ ...request, id });
      if (grammar !== undefined) this.#setMask(id, 0, grammar.mask);
    } catch (error) {
      this.#forget(id);
      grammar?.close();
      throw fromNative(error);
    }
    return { abort: () => this.#leave(id) };
  }

  /** Rejects what runs; the engine is closed by the caller. */
  close(): void {
    this.#isClosed = true;
    const requests = [...this.#live.keys()];
    for (const id of requests) this.#forget(id)?.handler.reject(disposed());
  }

  #route(event: NativeEvent, now: number): void {
    const live = this.#live.get(event.id);
    if (live === undefined) return; // aborted: its last events are nobody's
    const { handler, trace } = live;
    const wasStopped = handler.hasStopped;
    this.metrics.event(trace, event, now);
    try {
      if (handler.accept(event)) this.#forget(event.id);
      else if (handler.hasStopped) {
        if (!wasStopped) this.#engine?.abort(event.id);
      } else {
        this.#guide(event, live);
      }
    } catch (error) {
      this.#fail(event.id, fromNative(error));
    }
  }

  // What a request whose tokens are drawn with JavaScript's help waits for.
  #guide(event: NativeEvent, { handler, grammar, trace }: Live): void {
    const { id, tokens, logits, completionIdx } = event;
    if (logits !== undefined) {
      this.#engine?.setLogits(id, completionIdx ?? 0, handler.edit(logits));
    }
    if (grammar === undefined || tokens.length === 0) return;
    const next = trace.numTokens;
    grammar.advance(
      tokens.map(({ token }) => token),
      (mask) => {
        if (this.#live.has(id)) this.#setMask(id, next, mask);
      },
      (error) => this.#fail(id, error),
    );
  }

  // Grammars write their masks into memory that threads share, which native code is not handed.
  #setMask(id: number, completionIdx: number, mask: Uint32Array): void {
    if (this.#maskCopy.length !== mask.length) this.#maskCopy = new Uint32Array(mask.length);
    this.#maskCopy.set(mask);
    this.#engine?.setMask(id, completionIdx, this.#maskCopy);
  }

  #forget(id: number): Live | undefined {
    const live = this.#live.get(id);
    this.#live.delete(id);
    live?.grammar?.close();
    return live;
  }

  // The caller wants no more of it.
  #leave(id: number): void {
    const live = this.#forget(id);
    if (live === undefined) return;
    this.metrics.ended(live.trace, 'abort', performance.now());
    if (!this.#isClosed) this.#engine?.abort(id);
  }

  #fail(id: number, error: TurbomindError): void {
    const live = this.#forget(id);
    if (live === undefined) return;
    this.metrics.ended(live.trace, 'error', performance.now());
    this.metrics.failed(error.code);
    if (!this.#isClosed) this.#engine?.abort(id);
    live.handler.failWith(error);
  }
}

export function disposed(): TurbomindError {
  return new TurbomindError(
    'ERR_TM_DISPOSED',
    'the pipeline was closed; make a new one with pipeline()',
  );
}
