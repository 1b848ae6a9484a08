// What the grammar service needs of a worker's thread; start-worker.ts gives the real one. Types only.
import type { FromWorker, ToWorker, Vocabulary } from './protocol.js';

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
