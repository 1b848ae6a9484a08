// A pipeline's metrics in a prom-client registry, without prom-client: a registry asks its metrics
// for their values, so objects with the same functions do. Several pipelines share one registry;
// their labels tell them apart. Runs on the JS thread, when the registry is read.
import { TurbomindError } from './errors.js';
import type { HistogramSnapshot } from './histogram.js';
import type { PipelineMetrics } from './metrics.js';

/** What prom-client's metrics and ours have in common. */
export interface RegisteredMetric {
  get(): Promise<object>;
  reset(): void;
}

/** What is used of prom-client's `Registry`. */
export interface MetricsRegistry {
  registerMetric(metric: RegisteredMetric): void;
  removeSingleMetric(name: string): void;
}

export interface RegisterMetricsOptions {
  /** Begins all names. Defaults to 'turbomind_'. */
  readonly prefix?: string | undefined;
  /** Labels of all values; needed to tell several pipelines of one registry apart. */
  readonly labels?: Readonly<Record<string, string>> | undefined;
}

type Labels = Readonly<Record<string, string | number>>;

interface Value {
  readonly value: number;
  readonly labels: Labels;
  readonly metricName?: string;
}

interface Definition {
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

const DEFINITIONS: readonly Definition[] = [
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

/** One pipeline in a registry. */
interface Source {
  readonly labels: Labels;
  readonly read: () => PipelineMetrics;
}

/** The metrics of one prefix in one registry. */
interface Group {
  readonly sources: Set<Source>;
  readonly metrics: readonly RegistryMetric[];
}

const groups = new WeakMap<MetricsRegistry, Map<string, Group>>();

/** One metric, as registries read it. */
class RegistryMetric implements RegisteredMetric {
  readonly name: string;
  readonly help: string;
  readonly type: Definition['type'];
  readonly aggregator = 'sum';
  readonly #definition: Definition;
  readonly #sources: ReadonlySet<Source>;

  constructor(definition: Definition, prefix: string, sources: ReadonlySet<Source>) {
    this.name = `${prefix}${definition.name}`;
    this.help = definition.help;
    this.type = definition.type;
    this.#definition = definition;
    this.#sources = sources;
  }

  async get(): Promise<object> {
    const { name, help, type, aggregator } = this;
    const values = [...this.#sources].flatMap(({ labels, read }) =>
      this.#definition.read(read(), name).map((value) => {
        return { ...value, labels: { ...value.labels, ...labels } };
      }),
    );
    return { name, help, type, aggregator, values };
  }

  /** Counters of a process are not set back. */
  reset(): void {}
}

/**
 * Adds a pipeline to a registry; returns what takes it out again.
 * @throws TurbomindError ERR_TM_INVALID_OPTION
 */
export function addToRegistry(
  registry: MetricsRegistry,
  options: RegisterMetricsOptions,
  read: () => PipelineMetrics,
): () => void {
  if (typeof registry?.registerMetric !== 'function') {
    throw invalid('registry: expected a prom-client Registry');
  }
  const { prefix = 'turbomind_', labels = {} } = options;
  checkNames(prefix, labels);
  const group = groupOf(registry, prefix);
  const key = labelKey(labels);
  if ([...group.sources].some((source) => labelKey(source.labels) === key)) {
    throw invalid(
      `labels: a pipeline with the labels ${key} is registered already; give each pipeline its ` +
        "own, such as { pipeline: 'a' }",
    );
  }
  const source = { labels, read };
  group.sources.add(source);
  return () => removeSource(registry, prefix, group, source);
}

function groupOf(registry: MetricsRegistry, prefix: string): Group {
  const known = groups.get(registry) ?? new Map<string, Group>();
  groups.set(registry, known);
  const found = known.get(prefix);
  if (found !== undefined) return found;
  const sources = new Set<Source>();
  const metrics = DEFINITIONS.map((definition) => new RegistryMetric(definition, prefix, sources));
  for (const metric of metrics) registry.registerMetric(metric);
  const group = { sources, metrics };
  known.set(prefix, group);
  return group;
}

function removeSource(
  registry: MetricsRegistry,
  prefix: string,
  group: Group,
  source: Source,
): void {
  if (!group.sources.delete(source) || group.sources.size > 0) return;
  groups.get(registry)?.delete(prefix);
  for (const { name } of group.metrics) registry.removeSingleMetric(name);
}

function labelKey(labels: Labels): string {
  return JSON.stringify(Object.entries(labels).sort(([a], [b]) => (a < b ? -1 : 1)));
}

function checkNames(prefix: string, labels: Labels): void {
  if (!/^[A-Za-z_:][A-Za-z0-9_:]*$/.test(prefix)) {
    throw invalid(`prefix: ${JSON.stringify(prefix)} begins no metric name`);
  }
  for (const [name, value] of Object.entries(labels)) {
    const isName = /^[A-Za-z_][A-Za-z0-9_]*$/.test(name);
    if (!isName || ['le', 'reason', 'code', 'by'].includes(name) || typeof value !== 'string') {
      throw invalid(`labels: ${name} is not a label of its own with a text`);
    }
  }
}

function invalid(message: string): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_OPTION', `registerMetrics: ${message}`);
}
