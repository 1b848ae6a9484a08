// Native events to the requests they belong to, by id. Owns the ids, the abort signals' listeners
// and the answer to "is the engine still open". Runs on the JS thread.
import { TurbomindError } from './errors.js';
import { fromNative } from './native.js';
import type { NativeEngine, NativeEvent, NativeRequest } from './native-types.js';

/** Who is told what becomes of a request. */
export interface RequestHandler {
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

export class EventRouter {
  readonly #live = new Map<number, RequestHandler>();
  #engine: NativeEngine | undefined;
  #isClosed = false;
  #lastId = 0;

  /** Give this to `addon.open`. */
  readonly onEvents = (events: readonly NativeEvent[]): void => {
    for (const event of events) this.#route(event);
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

  /** @throws TurbomindError ERR_TM_DISPOSED */
  submit(handler: RequestHandler, request: Omit<NativeRequest, 'id'>): Submitted {
    const { engine } = this;
    this.#lastId += 1;
    const id = this.#lastId;
    this.#live.set(id, handler);
    handler.submitted(request.promptTokens);
    try {
      engine.submit({ ...request, id });
    } catch (error) {
      this.#live.delete(id);
      throw fromNative(error);
    }
    return { abort: () => this.#abort(id) };
  }

  /** Rejects what runs; the engine is closed by the caller. */
  close(): void {
    this.#isClosed = true;
    const requests = [...this.#live.values()];
    this.#live.clear();
    for (const handler of requests) handler.reject(disposed());
  }

  #route(event: NativeEvent): void {
    const handler = this.#live.get(event.id);
    if (handler === undefined) return; // aborted: its last events are nobody's
    const wasStopped = handler.hasStopped;
    try {
      if (handler.accept(event)) this.#live.delete(event.id);
      else if (handler.hasStopped && !wasStopped) this.#engine?.abort(event.id);
      else if (event.logits !== undefined && !handler.hasStopped) {
        this.#engine?.setLogits(event.id, event.completionIdx ?? 0, handler.edit(event.logits));
      }
    } catch (error) {
      this.#abort(event.id);
      handler.failWith(fromNative(error));
    }
  }

  #abort(id: number): void {
    if (this.#live.delete(id) && !this.#isClosed) this.#engine?.abort(id);
  }
}

export function disposed(): TurbomindError {
  return new TurbomindError(
    'ERR_TM_DISPOSED',
    'the pipeline was closed; make a new one with pipeline()',
  );
}
