// The metrics that a registry gets: names, help texts, kinds, and how each is read out of a pipeline's
// counters. docs/api.md lists them. Pure functions.
import type { HistogramSnapshot } from './histogram.js';
import type { PipelineMetrics } from './metrics.js';

export type Labels = Readonly<Record<string, string | number>>;

interface Value {
  readonly value: number;
  readonly labels: Labels;
  readonly metricName?: string;
}

/** A metric: its name without the prefix, and how its values are read. */
export interface Definition {
  readonly name: string;
  readonly help: string;
  readonly type: 'counter' | 'gauge' | 'histogram';
  /** Values of one pipeline; `name` is the whole one. */
  readonly read: (metrics: PipelineMetrics, name: string) => Value[];
}

const one = (value: number, labels: Labels = {}): Value[] => [{ value, labels }];

const byLabel = (label: string, counts: Readonly<Record<string, number>>): Value[] =>
  Object.entries(counts).map(([key, value]) => ({ value, labels: { [label]: key } }));

function histogram(
  name: keyof PipelineMetrics['histograms'],
  help: string,
  exported: string,
): Definition {
  return {
    name: exported,
    help,
    type: 'histogram',
    read: (metrics, whole) => histogramValues(metrics.histograms[name], whole),
  };
}

function histogramValues({ buckets, sum, count }: HistogramSnapshot, name: string): Value[] {
  return [
    ...buckets.map((bucket) => ({
      value: bucket.count,
      labels: { le: bucket.le === Number.POSITIVE_INFINITY ? '+Inf' : bucket.le },
      metricName: `${name}_bucket`,
    })),
    { value: sum, labels: {}, metricName: `${name}_sum` },
    { value: count, labels: {}, metricName: `${name}_count` },
  ];
}

/** One row a metric. */
export const DEFINITIONS: readonly Definition[] = [
  {
    name: 'requests_submitted_total',
    help: 'Requests handed to the engine.',
    type: 'counter',
    read: ({ requests }) => one(requests.submitted),
  },
  {
    name: 'requests_finished_total',
    help: 'Requests that have ended, by finish reason.',
    type: 'counter',
    read: ({ requests }) => byLabel('reason', requests.finished),
  },
  {
    name: 'request_errors_total',
    help: 'Requests that have failed, by error code.',
    type: 'counter',
    read: ({ requests }) => byLabel('code', requests.errors),
  },
  {
    name: 'requests_running',
    help: 'Requests that hold cache blocks.',
    type: 'gauge',
    read: ({ requests }) => one(requests.running),
  },
  {
    name: 'requests_waiting',
    help: 'Requests that wait for their first step.',
    type: 'gauge',
    read: ({ requests }) => one(requests.waiting),
  },
  {
    name: 'prompt_tokens_total',
    help: 'Tokens of submitted prompts.',
    type: 'counter',
    read: ({ tokens }) => one(tokens.prompt),
  },
  {
    name: 'completion_tokens_total',
    help: 'Tokens generated.',
    type: 'counter',
    read: ({ tokens }) => one(tokens.completion),
  },
  {
    name: 'cached_tokens_total',
    help: 'Prompt tokens found in the cache.',
    type: 'counter',
    read: ({ tokens }) => one(tokens.cached),
  },
  {
    name: 'cache_blocks',
    help: 'KV cache blocks there are.',
    type: 'gauge',
    read: ({ cache }) => one(cache.totalBlocks),
  },
  {
    name: 'cache_blocks_used',
    help: 'KV cache blocks in use.',
    type: 'gauge',
    read: ({ cache }) => one(cache.usedBlocks),
  },
  {
    name: 'cache_hit_ratio',
    help: 'Cached share of the prompt tokens of ended requests.',
    type: 'gauge',
    read: ({ cache }) => one(cache.hitRate),
  },
  {
    name: 'preemptions_total',
    help: 'Times that a request gave its blocks back, by what became of them.',
    type: 'counter',
    read: ({ engine: { preemptions, swapsOut } }) =>
      byLabel('by', { recompute: preemptions - swapsOut, swap: swapsOut }),
  },
  {
    name: 'steps_total',
    help: 'Steps of the engine.',
    type: 'counter',
    read: ({ engine }) => one(engine.steps),
  },
  histogram('queueSeconds', 'Time before the first step.', 'queue_seconds'),
  histogram(
    'timeToFirstTokenSeconds',
    'Time from the call to the first token.',
    'time_to_first_token_seconds',
  ),
  histogram('interTokenSeconds', 'Time between tokens of an answer.', 'inter_token_seconds'),
  histogram('requestSeconds', 'Time from the call to the end.', 'request_seconds'),
  histogram('stepSeconds', 'Time of a step of the engine.', 'step_seconds'),
  histogram('promptTokens', 'Prompt tokens of a request.', 'request_prompt_tokens'),
  histogram('completionTokens', 'Tokens of an answer.', 'request_completion_tokens'),
];
