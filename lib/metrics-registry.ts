// A pipeline's metrics in a prom-client registry, without prom-client: a registry asks its metrics
// for their values, so objects with the same functions do. Several pipelines share one registry;
// their labels tell them apart. Runs on the JS thread, when the registry is read.
import * as check from './check.js';
import { TurbomindError } from './errors.js';
import { DEFINITIONS, type Definition, type Labels } from './metric-definitions.js';
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

const RULES: check.Rules<RegisterMetricsOptions> = {
  prefix: check.text,
  labels: (value) =>
    typeof value === 'object' && value !== null && !Array.isArray(value)
      ? undefined
      : 'an object of label names and texts',
};

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
  check.checkOptions<RegisterMetricsOptions>('registerMetrics options', options, RULES);
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
  registerAll(registry, metrics);
  const group = { sources, metrics };
  known.set(prefix, group);
  return group;
}

// All of them or none: a registry refuses a name that somebody else has taken.
function registerAll(registry: MetricsRegistry, metrics: readonly RegistryMetric[]): void {
  const registered: string[] = [];
  try {
    for (const metric of metrics) {
      registry.registerMetric(metric);
      registered.push(metric.name);
    }
  } catch (cause) {
    for (const name of registered) registry.removeSingleMetric(name);
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw invalid(`${reason}; give a prefix that nobody else uses`, cause);
  }
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
    throw invalid(
      `prefix: ${JSON.stringify(prefix)} begins no metric name; expected letters, digits, _ and :, no digit first`,
    );
  }
  for (const [name, value] of Object.entries(labels)) {
    const isName = /^[A-Za-z_][A-Za-z0-9_]*$/.test(name);
    if (!isName || ['le', 'reason', 'code', 'by'].includes(name) || typeof value !== 'string') {
      throw invalid(
        `labels: ${name} is not a label of its own with a text; le, reason, code and by are taken`,
      );
    }
  }
}

function invalid(message: string, cause?: unknown): TurbomindError {
  const options = cause === undefined ? {} : { cause };
  return new TurbomindError('ERR_TM_INVALID_OPTION', `registerMetrics: ${message}`, options);
}
