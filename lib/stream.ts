// An async iterable over the parts of one prompt's answer, or of a batch's. Work starts at the
// first pull. A slow reader gets fewer, longer parts: text waits in its request, not in a queue.
// Leaving the loop aborts. Runs on the JS thread.
import type { Completion, CompletionListener } from './completion.js';
import type { StreamPart } from './response.js';

/** Starts the requests of a stream; parts reach the listener from then on. */
export interface StreamSource {
  /** Resolves with the number of answers. */
  start(listener: CompletionListener): Promise<number>;
  /** Ends what still runs. Idempotent. */
  abort(): void;
  /** Whether an error ends the stream (one prompt) or is a part of it (a batch). */
  isBatch(): boolean;
}

export class ResponseStream implements AsyncIterableIterator<StreamPart>, AsyncDisposable {
  readonly #source: StreamSource;
  readonly #ready = new Set<Completion>();
  #started = false;
  #isDone = false;
  #total: number | undefined;
  #numFinished = 0;
  #failure: { readonly reason: unknown } | undefined;
  #wake: (() => void) | undefined;
  #lastPull: Promise<unknown> = Promise.resolve();

  constructor(source: StreamSource) {
    this.#source = source;
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  /** The next part. Calls queue up behind each other. */
  next(): Promise<IteratorResult<StreamPart>> {
    const pull = this.#lastPull.then(() => this.#pull());
    this.#lastPull = pull.catch(() => undefined);
    return pull;
  }

  /** Aborts what still runs; `break` calls it. */
  async return(): Promise<IteratorResult<StreamPart>> {
    this.#end();
    return { done: true, value: undefined };
  }

  async throw(reason: unknown): Promise<IteratorResult<StreamPart>> {
    this.#end();
    throw reason;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#end();
  }

  #end(): void {
    if (this.#isDone) return;
    this.#isDone = true;
    this.#source.abort();
    this.#wake?.();
  }

  async #pull(): Promise<IteratorResult<StreamPart>> {
    while (!this.#isDone) {
      this.#start();
      if (this.#failure !== undefined) {
        this.#end();
        throw this.#failure.reason;
      }
      const part = this.#takeReady();
      if (part !== undefined) return this.#deliver(part);
      if (this.#numFinished === this.#total) break;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    this.#isDone = true;
    return { done: true, value: undefined };
  }

  #deliver(part: StreamPart): IteratorResult<StreamPart> {
    if (part.response !== undefined) {
      this.#numFinished += 1;
      if (part.response.error !== undefined && !this.#source.isBatch()) {
        this.#end();
        throw part.response.error;
      }
    }
    return { done: false, value: part };
  }

  #start(): void {
    if (this.#started) return;
    this.#started = true;
    this.#source
      .start({
        updated: (completion) => this.#noteReady(completion),
        finished: (completion) => this.#noteReady(completion),
        failed: (reason) => this.#noteFailure(reason),
      })
      .then(
        (count) => this.#noteCount(count),
        (reason: unknown) => this.#noteFailure(reason),
      );
  }

  #takeReady(): StreamPart | undefined {
    for (const completion of this.#ready) {
      this.#ready.delete(completion);
      const part = completion.take();
      if (part !== undefined) return part;
    }
    return undefined;
  }

  #noteReady(completion: Completion): void {
    this.#ready.add(completion);
    this.#wake?.();
  }

  #noteFailure(reason: unknown): void {
    this.#failure ??= { reason };
    this.#wake?.();
  }

  // Parts may be delivered before all prompts of a batch are started.
  #noteCount(count: number): void {
    this.#total = count;
    this.#wake?.();
  }
}
