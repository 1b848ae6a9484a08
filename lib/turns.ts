// Long work on the JS thread, cut into slices: events and timers get their turn in between.
import { setImmediate as nextTurn } from 'node:timers/promises';

/** How long prompts may keep the thread while they are encoded, milliseconds. */
export const ENCODING_SLICE_MS = 8;
/** How long a picture's bytes may, beside token streams. */
export const PICTURE_SLICE_MS = 2;

export class Turns {
  readonly #sliceMs: number;
  #since = performance.now();

  /** `sliceMs`: how long the work may keep the thread, milliseconds. */
  constructor(sliceMs: number) {
    this.#sliceMs = sliceMs;
  }

  /** Lets the event loop turn once the slice is used up; call it between small pieces of work. */
  async giveWay(): Promise<void> {
    if (performance.now() - this.#since < this.#sliceMs) return;
    await nextTurn();
    this.#since = performance.now();
  }
}
