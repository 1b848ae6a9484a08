// A histogram with fixed bounds, as Prometheus counts them. Observing is one short search and two
// additions. Runs on the JS thread.

/** A histogram at one moment. */
export interface HistogramSnapshot {
  /** Observations at most `le`, those of smaller bounds counted; the last bound is Infinity. */
  readonly buckets: readonly { readonly le: number; readonly count: number }[];
  readonly sum: number;
  readonly count: number;
}

export class Histogram {
  readonly #bounds: readonly number[];
  readonly #counts: Float64Array;
  #sum = 0;

  /** @param bounds upper bounds, rising; Infinity is added. */
  constructor(bounds: readonly number[]) {
    this.#bounds = bounds;
    this.#counts = new Float64Array(bounds.length + 1);
  }

  /** Adds `count` observations of the same value. */
  observe(value: number, count = 1): void {
    let low = 0;
    let high = this.#bounds.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (value <= (this.#bounds[middle] ?? 0)) high = middle;
      else low = middle + 1;
    }
    this.#counts[low] = (this.#counts[low] ?? 0) + count;
    this.#sum += value * count;
  }

  snapshot(): HistogramSnapshot {
    let count = 0;
    const buckets = [...this.#bounds, Number.POSITIVE_INFINITY].map((le, index) => {
      count += this.#counts[index] ?? 0;
      return { le, count };
    });
    return { buckets, sum: this.#sum, count };
  }
}
