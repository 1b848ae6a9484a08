import { Counter, Registry } from 'prom-client';
import { beforeAll, describe, expect, test } from 'vitest';
import { openCheckpoint } from '../../lib/checkpoint/checkpoint.js';
import { embeddedModel } from '../../lib/embedded-model.js';
import { Histogram } from '../../lib/histogram.js';
import { openPipeline } from '../../lib/open-pipeline.js';
import type { Pipeline } from '../../lib/pipeline.js';
import { loadTokenizer, type Tokenizer } from '../../lib/tokenizer.js';
import { makeFakeAddon } from './support/fake-addon.js';

const EOS = 258;
let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await loadTokenizer(await openCheckpoint(embeddedModel()));
});

async function open(text = 'abc'): Promise<Pipeline> {
  const addon = makeFakeAddon({ answer: () => [...tokenizer.encode(text), EOS] });
  return await openPipeline(embeddedModel(), { device: 'cpu' }, addon);
}

describe('a histogram', () => {
  test('counts values at most each bound, as Prometheus does', () => {
    const histogram = new Histogram([1, 2, 5]);
    for (const value of [0, 1, 1.5, 2, 3, 5, 6]) histogram.observe(value);
    histogram.observe(4, 3);
    const { buckets, sum, count } = histogram.snapshot();
    expect(buckets.map((bucket) => bucket.count)).toEqual([2, 4, 9, 10]);
    expect(buckets.map(({ le }) => le)).toEqual([1, 2, 5, Number.POSITIVE_INFINITY]);
    expect({ sum, count }).toEqual({ sum: 30.5, count: 10 });
  });
});

describe('pipe.metrics()', () => {
  test('counts requests, tokens and times', async () => {
    const pipe = await open();
    const [first] = await pipe(['Hello!', 'Hello!']);
    await pipe('Hello!', { maxNewTokens: 2 });
    const { requests, tokens, histograms } = pipe.metrics();
    expect(requests).toMatchObject({
      submitted: 3,
      finished: { stop: 2, length: 1, abort: 0, error: 0 },
      errors: {},
    });
    expect(tokens).toEqual({ prompt: 3 * (first?.inputTokenLen ?? 0), completion: 10, cached: 0 });
    expect(histograms.timeToFirstTokenSeconds.count).toBe(3);
    expect(histograms.interTokenSeconds.count).toBe(10 - 3);
    expect(histograms.queueSeconds).toMatchObject({ count: 3, sum: 0.003 });
    expect(histograms.completionTokens).toMatchObject({ count: 3, sum: 10 });
    expect(histograms.requestSeconds.count).toBe(3);
    // The engine's own counts, summed up.
    expect(histograms.stepSeconds).toEqual({
      buckets: [
        { le: 0.01, count: 2 },
        { le: 0.1, count: 3 },
        { le: Number.POSITIVE_INFINITY, count: 3 },
      ],
      sum: 0.06,
      count: 3,
    });
    await pipe.close();
  });

  test('counts failures by code, and those that left', async () => {
    const pipe = await open('a'.repeat(400));
    await expect(pipe('x'.repeat(100_000))).rejects.toMatchObject({ code: expect.any(String) });
    for await (const part of pipe.stream('Hello!')) if (part.text !== '') break;
    const { requests } = pipe.metrics();
    expect(Object.values(requests.errors)).toEqual([1]);
    expect(requests.finished.abort).toBe(1);
    expect(requests.submitted).toBe(1);
    await pipe.close();
  });
});

describe('registerMetrics', () => {
  test('fills a prom-client registry', async () => {
    const [pipe, registry] = [await open(), new Registry()];
    pipe.registerMetrics(registry, { labels: { model: 'tiny' } });
    await pipe('Hello!');
    const text = await registry.metrics();
    expect(text).toContain('# TYPE turbomind_requests_finished_total counter');
    expect(text).toContain('turbomind_requests_finished_total{reason="stop",model="tiny"} 1');
    expect(text).toContain('turbomind_completion_tokens_total{model="tiny"} 4');
    expect(text).toContain('turbomind_preemptions_total{by="recompute",model="tiny"} 0');
    expect(text).toContain('turbomind_preemptions_total{by="swap",model="tiny"} 0');
    expect(text).toContain('turbomind_step_seconds_bucket{le="0.1",model="tiny"} 3');
    expect(text).toContain('# TYPE turbomind_inter_token_seconds histogram');
    expect(text).toContain('turbomind_inter_token_seconds_bucket{le="+Inf",model="tiny"} 3');
    expect(text).toContain('turbomind_inter_token_seconds_count{model="tiny"} 3');
    expect(text).toMatch(/turbomind_cache_blocks\{model="tiny"\} 8\n/);
    const json = await registry.getMetricsAsJSON();
    expect(json.map(({ name }) => name)).toContain('turbomind_queue_seconds');
    await pipe.close();
    expect(await registry.metrics()).toBe('\n');
  });

  test('two pipelines share a registry by their labels', async () => {
    const [a, b, registry] = [await open(), await open(), new Registry()];
    a.registerMetrics(registry, { labels: { pipeline: 'a' } });
    const unregister = b.registerMetrics(registry, { labels: { pipeline: 'b' } });
    expect(() => b.registerMetrics(registry, { labels: { pipeline: 'a' } })).toThrow(/already/);
    await Promise.all([a('Hello!'), b(['Hello!', 'Hello!'])]);
    const text = await registry.metrics();
    expect(text).toContain('turbomind_requests_submitted_total{pipeline="a"} 1');
    expect(text).toContain('turbomind_requests_submitted_total{pipeline="b"} 2');
    expect(text.match(/# TYPE turbomind_requests_submitted_total/g)).toHaveLength(1);
    unregister();
    expect(await registry.metrics()).not.toContain('pipeline="b"');
    await Promise.all([a.close(), b.close()]);
  });

  test('names and labels are checked', async () => {
    const [pipe, registry] = [await open(), new Registry()];
    expect(() => pipe.registerMetrics(registry, { prefix: '1-' })).toThrow(/begins no metric/);
    expect(() => pipe.registerMetrics(registry, { labels: { le: 'x' } })).toThrow(/labels: le/);
    const misspelt = { label: { pipeline: 'a' } } as object;
    expect(() => pipe.registerMetrics(registry, misspelt)).toThrow(/did you mean labels/);
    const wrong = { labels: 'a' } as object;
    expect(() => pipe.registerMetrics(registry, wrong)).toThrow(/labels: "a" is not valid/);
    await pipe.close();
  });

  test('a registry that refuses one of them keeps none', async () => {
    const [pipe, registry] = [await open(), new Registry()];
    const taken = { name: 'turbomind_steps_total', help: 'of somebody else' };
    registry.registerMetric(new Counter(taken));
    expect(() => pipe.registerMetrics(registry)).toThrow(
      expect.objectContaining({
        code: 'ERR_TM_INVALID_OPTION',
        message: expect.stringMatching(/turbomind_steps_total.*give a prefix/),
      }),
    );
    expect(registry.getMetricsAsArray().map(({ name }) => name)).toEqual([taken.name]);
    pipe.registerMetrics(registry, { prefix: 'mine_' });
    expect(await registry.metrics()).toContain('mine_steps_total');
    await pipe.close();
  });
});
