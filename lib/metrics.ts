// What a pipeline has done, counted as it happens: requests, tokens, waiting and working times.
// Counting follows native events, a few additions each; gauges are read from the engine when
// somebody asks. Runs on the JS thread; every pipeline has counters of its own.
import type { TurbomindErrorCode } from './errors.js';
import { Histogram, type HistogramSnapshot } from './histogram.js';
import type { NativeEvent, NativeStats } from './native-types.js';

/** Upper bounds of the histograms' buckets; docs/api.md lists them. */
const QUEUE_SECONDS = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60];
const FIRST_TOKEN_SECONDS = [
  0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60,
];
const INTER_TOKEN_SECONDS = [
  0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1,
  2.5,
];
const REQUEST_SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600];
const TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072];

/** All counters of a pipeline at one moment; times in seconds. */
export interface PipelineMetrics {
  readonly requests: {
    /** Handed to the engine; each answer of `n` counts. */
    readonly submitted: number;
    /** Ended, by finish reason; 'abort' are those the caller left. */
    readonly finished: Readonly<Record<'stop' | 'length' | 'abort' | 'error', number>>;
    /** Failed requests by error code, those refused before the engine counted too. */
    readonly errors: Readonly<Record<string, number>>;
    /** In the engine now. */
    readonly running: number;
    readonly waiting: number;
  };
  readonly tokens: {
    /** Of submitted prompts, those of pictures included. */
    readonly prompt: number;
    readonly completion: number;
    /** Prompt tokens that were found in the cache, of requests that have ended. */
    readonly cached: number;
  };
  readonly cache: {
    readonly totalBlocks: number;
    readonly usedBlocks: number;
    /** 0 to 1. */
    readonly use: number;
    /** Cached share of the prompt tokens of requests that have ended, 0 to 1. */
    readonly hitRate: number;
  };
  readonly engine: {
    readonly steps: number;
    readonly preemptions: number;
    /** Of these, those whose blocks were saved to host memory; the others are computed again. */
    readonly swapsOut: number;
    /** Of these, those that have gone on with the saved blocks. */
    readonly swapsIn: number;
  };
  readonly histograms: {
    /** From the engine's taking a request to its first step. */
    readonly queueSeconds: HistogramSnapshot;
    /** From the call to the first token, pictures and template included. */
    readonly timeToFirstTokenSeconds: HistogramSnapshot;
    /** Between the tokens of an answer, as they arrive in JavaScript. */
    readonly interTokenSeconds: HistogramSnapshot;
    /** From the call to the end. */
    readonly requestSeconds: HistogramSnapshot;
    /** Of the engine: from the launch of a step to its tokens. */
    readonly stepSeconds: HistogramSnapshot;
    readonly promptTokens: HistogramSnapshot;
    readonly completionTokens: HistogramSnapshot;
  };
}

/** One request's own times, kept by whoever sees its events. */
export interface RequestTrace {
  readonly startedAt: number;
  readonly numPromptTokens: number;
  lastTokenAt: number;
  numTokens: number;
}

export class MetricsRecorder {
  readonly #finished = { stop: 0, length: 0, abort: 0, error: 0 };
  readonly #errors = new Map<string, number>();
  readonly #queue = new Histogram(QUEUE_SECONDS);
  readonly #firstToken = new Histogram(FIRST_TOKEN_SECONDS);
  readonly #interToken = new Histogram(INTER_TOKEN_SECONDS);
  readonly #request = new Histogram(REQUEST_SECONDS);
  readonly #promptTokens = new Histogram(TOKENS);
  readonly #completionTokens = new Histogram(TOKENS);
  #submitted = 0;
  #prompt = 0;
  #endedPrompt = 0;
  #completion = 0;
  #cached = 0;

  /** @param startedAt when the caller called, by performance.now(). */
  submitted(startedAt: number, numPromptTokens: number): RequestTrace {
    this.#submitted += 1;
    this.#prompt += numPromptTokens;
    this.#promptTokens.observe(numPromptTokens);
    return { startedAt, numPromptTokens, lastTokenAt: 0, numTokens: 0 };
  }

  /** @param now one reading of the clock for a whole batch of events. */
  event(trace: RequestTrace, event: NativeEvent, now: number): void {
    const count = event.tokens.length;
    if (count > 0) this.#tokens(trace, count, now);
    const { finishReason } = event;
    if (finishReason === undefined) return;
    const { errorCode, timings, cachedTokens = 0 } = event;
    this.ended(trace, finishReason, now);
    this.#cached += cachedTokens;
    this.#endedPrompt += trace.numPromptTokens;
    if (finishReason === 'error') this.failed(errorCode ?? 'ERR_TM_INTERNAL');
    else if (timings !== undefined) this.#queue.observe(timings.queueMs / 1000);
  }

  /** A request ended otherwise than by its last event: the caller left it, or it failed here. */
  ended(trace: RequestTrace, reason: 'stop' | 'length' | 'abort' | 'error', now: number): void {
    this.#finished[reason] += 1;
    this.#request.observe((now - trace.startedAt) / 1000);
    this.#completionTokens.observe(trace.numTokens);
  }

  failed(code: TurbomindErrorCode | string): void {
    this.#errors.set(code, (this.#errors.get(code) ?? 0) + 1);
  }

  // Several tokens of one event came together: each counts with its share of the time.
  #tokens(trace: RequestTrace, count: number, now: number): void {
    this.#completion += count;
    if (trace.numTokens === 0) {
      this.#firstToken.observe((now - trace.startedAt) / 1000);
      if (count > 1) this.#interToken.observe(0, count - 1);
    } else {
      this.#interToken.observe((now - trace.lastTokenAt) / 1000 / count, count);
    }
    trace.numTokens += count;
    trace.lastTokenAt = now;
  }

  /** @param stats the engine's; undefined once it is closed. */
  snapshot(stats: NativeStats | undefined): PipelineMetrics {
    const { totalBlocks = 0, freeBlocks = 0 } = stats ?? {};
    const usedBlocks = totalBlocks - freeBlocks;
    return {
      requests: {
        submitted: this.#submitted,
        finished: { ...this.#finished },
        errors: Object.fromEntries(this.#errors),
        running: stats?.running ?? 0,
        waiting: stats?.waiting ?? 0,
      },
      tokens: { prompt: this.#prompt, completion: this.#completion, cached: this.#cached },
      cache: {
        totalBlocks,
        usedBlocks,
        use: totalBlocks === 0 ? 0 : usedBlocks / totalBlocks,
        hitRate: this.#endedPrompt === 0 ? 0 : this.#cached / this.#endedPrompt,
      },
      engine: {
        steps: stats?.steps ?? 0,
        preemptions: stats?.preemptions ?? 0,
        swapsOut: stats?.swapsOut ?? 0,
        swapsIn: stats?.swapsIn ?? 0,
      },
      histograms: {
        queueSeconds: this.#queue.snapshot(),
        timeToFirstTokenSeconds: this.#firstToken.snapshot(),
        interTokenSeconds: this.#interToken.snapshot(),
        requestSeconds: this.#request.snapshot(),
        stepSeconds: stepSeconds(stats),
        promptTokens: this.#promptTokens.snapshot(),
        completionTokens: this.#completionTokens.snapshot(),
      },
    };
  }
}

// Counted by the engine, bucket by bucket.
function stepSeconds(stats: NativeStats | undefined): HistogramSnapshot {
  const { bounds, counts, sum } = stats?.stepTimes ?? { bounds: [], counts: [0], sum: 0 };
  let count = 0;
  const buckets = [...bounds, Number.POSITIVE_INFINITY].map((le, index) => {
    count += counts[index] ?? 0;
    return { le, count };
  });
  return { buckets, sum, count };
}
