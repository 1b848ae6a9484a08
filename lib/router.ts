// Native events to the requests they belong to, by id. Owns the ids, the abort signals' listeners
// and the answer to "is the engine still open". Runs on the JS thread.
import type { Completion } from './completion.js';
import { TurbomindError } from './errors.js';
import { fromNative } from './native.js';
import type { NativeEngine, NativeEvent, NativeRequest } from './native-types.js';

/** A submitted request, to abort it. */
export interface Submitted {
  abort(): void;
}

export class EventRouter {
  readonly #live = new Map<number, Completion>();
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
  submit(completion: Completion, request: Omit<NativeRequest, 'id'>): Submitted {
    const { engine } = this;
    this.#lastId += 1;
    const id = this.#lastId;
    this.#live.set(id, completion);
    completion.submitted(request.promptTokens.length);
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
    for (const completion of requests) completion.reject(disposed());
  }

  #route(event: NativeEvent): void {
    const completion = this.#live.get(event.id);
    if (completion === undefined) return; // aborted: its last events are nobody's
    const wasStopped = completion.hasStopped;
    try {
      if (completion.accept(event)) this.#live.delete(event.id);
      else if (completion.hasStopped && !wasStopped) this.#engine?.abort(event.id);
    } catch (error) {
      this.#abort(event.id);
      completion.failWith(fromNative(error));
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
