// From the trace of test/kernels/step_trace.cc to tables: which kernels a step is made of, how long each
// takes, how near it comes to the device's measured rates, and where the time between kernels goes.
// What a GEMM reads and computes follows from the model's config.json and its place in the layer.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

/** Sizes of the decoder in a model folder; kvBits: of the cache. */
export function decoderShape(folder, kvBits = 16) {
  const config = JSON.parse(readFileSync(join(folder, 'config.json'), 'utf8'));
  const text = config.llm_config ?? config.text_config ?? config;
  const quant = config.quantization_config ?? text.quantization_config;
  const heads = text.num_attention_heads;
  const headDim = text.head_dim ?? text.hidden_size / heads;
  return {
    hidden: text.hidden_size,
    mlp: text.intermediate_size,
    layers: text.num_hidden_layers,
    heads,
    kvHeads: text.num_key_value_heads,
    headDim,
    vocab: text.vocab_size,
    kvBytes: kvBits / 8,
    weightBits: quant ? 4 + 32 / (quant.group_size ?? 128) : 16,
  };
}

const DECODE_ATTENTION = 'decode_kernel';
const LABELS = {
  decode_kernel: 'decode attention',
  prefill_kernel: 'prefill attention',
  prefill_sm90_kernel: 'prefill attention',
};
const PREFILL_ATTENTION = /^prefill_(sm90_)?kernel$/;
const GEMMS = ['qkv', 'o', 'gate-up', 'down'];

/** [N, K] of each linear layer. */
function linearShapes({ hidden, mlp, heads, kvHeads, headDim }) {
  return {
    qkv: [(heads + 2 * kvHeads) * headDim, hidden],
    o: [hidden, heads * headDim],
    'gate-up': [2 * mlp, hidden],
    down: [hidden, mlp],
  };
}

/** Bytes that a decode step cannot do without: all weights once, keys and values of every token. */
export function stepFloorBytes(shape, batch, context) {
  const layer = Object.values(linearShapes(shape)).reduce((sum, [n, k]) => sum + n * k, 0);
  const weights = (layer * shape.layers * shape.weightBits) / 8 + shape.vocab * shape.hidden * 2;
  const kv = 2 * shape.layers * shape.kvHeads * shape.headDim * context * batch * shape.kvBytes;
  return weights + kv;
}

/** Kernel records in order of time, in ns of Date.now()'s clock. */
export function readTrace(file) {
  const lines = readFileSync(file, 'utf8').split('\n').filter(Boolean);
  const { clock, realtime } = JSON.parse(lines[0]);
  return lines
    .slice(1)
    .map((line) => JSON.parse(line))
    .map(({ n, s, e, x, y, z, g }) => ({
      name: shortName(n),
      begin: s - clock + realtime,
      end: e - clock + realtime,
      grid: [x, y, z],
      inGraph: g !== 0,
    }))
    .sort((a, b) => a.begin - b.begin);
}

/**
 * The function's own name out of a mangled one: the last of the nested names after `_ZN`, each of which
 * has its length before it (Itanium C++ ABI, 5.1). Anything else is cut to a readable length.
 */
export function shortName(mangled) {
  let at = mangled.startsWith('_ZN') ? 3 : -1;
  let name = '';
  while (at >= 0) {
    const length = /^\d+/.exec(mangled.slice(at, at + 6))?.[0];
    if (length === undefined) break;
    at += length.length;
    name = mangled.slice(at, at + Number(length));
    at += Number(length);
  }
  return name === '' ? mangled.slice(0, 48) : name;
}

/** Steps: each begins with the kernel that spreads its arrays. */
export function splitSteps(kernels) {
  const steps = [];
  for (const kernel of kernels) {
    if (kernel.name.startsWith('unpack_step')) steps.push([]);
    steps.at(-1)?.push(kernel);
  }
  return steps.map((list) => ({
    kernels: list,
    begin: list[0].begin,
    decode: list.some(({ inGraph }) => inGraph),
    us: (Math.max(...list.map(({ end }) => end)) - list[0].begin) / 1000,
  }));
}

// Bytes and operations of a kernel that is no GEMM, 0 where the trace does not tell. Prefill attention:
// causal over whole prompts of `context` tokens, or over the first `rows` of one.
function work(name, step, { shape, rows, context, batch }) {
  const { hidden, heads, kvHeads, headDim, vocab } = shape;
  const row = 2 * hidden; // bytes of a token's state
  if (name === DECODE_ATTENTION && step.decode) {
    return { bytes: 2 * shape.kvBytes * kvHeads * headDim * context * batch, flops: 0 };
  }
  if (PREFILL_ATTENTION.test(name) && !step.decode) {
    return { bytes: 0, flops: 2 * heads * headDim * rows * Math.min(rows, context) };
  }
  if (name === 'rope_kv_kernel') {
    const [q, kv] = [heads * headDim, 2 * kvHeads * headDim];
    return { bytes: rows * (4 * q + (2 + shape.kvBytes) * kv), flops: 0 };
  }
  if (name === 'norm_kernel' || name === 'embed_kernel') return { bytes: 2 * rows * row, flops: 0 };
  if (name === 'scan_kernel') return { bytes: 4 * Math.min(rows, batch) * vocab, flops: 0 };
  return { bytes: 0, flops: 0 };
}

// What a kernel of the step is for, with its bytes and operations where the model tells. `us`: the part of
// its time in which no kernel before it ran, so that all of them and the idle time sum to the step.
function describe(step, shape, rows, context, batch) {
  const sizes = { shape, rows, context, batch };
  const linears = linearShapes(shape);
  let gemm = 0;
  let reached = step.begin;
  return step.kernels.map((kernel) => {
    const us = Math.max(0, kernel.end - Math.max(kernel.begin, reached)) / 1000;
    reached = Math.max(reached, kernel.end);
    if (/gemm|u4_stream/.test(kernel.name)) {
      const inLayers = gemm < 4 * shape.layers;
      const label = inLayers ? GEMMS[gemm % 4] : 'head';
      const [n, k] = inLayers ? linears[label] : [shape.vocab, shape.hidden];
      gemm += 1;
      const m = inLayers ? rows : Math.min(rows, batch);
      const bits = inLayers ? shape.weightBits : 16;
      const bytes = (n * k * bits) / 8 + 2 * m * (k + n);
      return { label: `${label} (${kernel.name})`, us, bytes, flops: 2 * m * n * k };
    }
    return { label: LABELS[kernel.name] ?? kernel.name, us, ...work(kernel.name, step, sizes) };
  });
}

const median = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)];

/**
 * The table of the median one of `steps`, which all have the same kernels.
 * peaks: { copyTBs, bf16TFLOPs }.
 */
export function tableOf(steps, shape, { rows, context, batch }, peaks) {
  const wanted = median(steps.map(({ us }) => us));
  const step = steps.reduce((a, b) => (Math.abs(b.us - wanted) < Math.abs(a.us - wanted) ? b : a));
  const groups = new Map();
  for (const { label, us, bytes, flops } of describe(step, shape, rows, context, batch)) {
    const group = groups.get(label) ?? { kernel: label, count: 0, us: 0, bytes: 0, flops: 0 };
    group.count += 1;
    group.us += us;
    group.bytes += bytes;
    group.flops += flops;
    groups.set(label, group);
  }
  // Time in which no kernel ran; kernels overlap where the next one starts early.
  let idle = 0;
  let reached = step.kernels[0].begin;
  for (const { begin, end } of step.kernels) {
    if (begin > reached) idle += begin - reached;
    reached = Math.max(reached, end);
  }
  const floorUs = stepFloorBytes(shape, batch, context) / peaks.copyTBs / 1e6;
  return {
    stepUs: step.us,
    kernels: step.kernels.length,
    kernelsPerLayer: (step.kernels.length - 4) / shape.layers,
    idleUs: idle / 1000,
    ...(step.decode ? { floorUs, shareOfFloor: floorUs / step.us } : {}),
    rows: [...groups.values()]
      .sort((a, b) => b.us - a.us)
      .map(({ kernel, count, us, bytes, flops }) => ({
        kernel,
        count,
        usEach: us / count,
        usTotal: us,
        ...(bytes > 0
          ? { GBs: bytes / us / 1000, copyShare: bytes / us / 1e6 / peaks.copyTBs }
          : {}),
        ...(flops > 0
          ? { TFLOPs: flops / us / 1e6, bf16Share: flops / us / 1e6 / peaks.bf16TFLOPs }
          : {}),
      })),
  };
}

const fixed = (value, digits) => (value === undefined ? '' : value.toFixed(digits));
const percent = (value) => (value === undefined ? '' : `${(100 * value).toFixed(0)}%`);

/** A table as Markdown. */
export function toMarkdown(title, table) {
  const head =
    `${title}: ${fixed(table.stepUs, 0)} us, ${table.kernels} kernels ` +
    `(${fixed(table.kernelsPerLayer, 1)} a layer), ${fixed(table.idleUs, 0)} us without a kernel` +
    (table.floorUs ? `, floor ${fixed(table.floorUs, 0)} us = ${percent(table.shareOfFloor)}` : '');
  const rows = table.rows.map(
    (r) =>
      `| ${r.kernel} | ${r.count} | ${fixed(r.usEach, 1)} | ${fixed(r.usTotal, 0)} | ` +
      `${fixed(r.GBs, 0)} | ${percent(r.copyShare)} | ${fixed(r.TFLOPs, 0)} | ${percent(r.bf16Share)} |`,
  );
  return [
    head,
    '',
    '| kernel | count | us each | us | GB/s | of copy | TFLOP/s | of bf16 |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ...rows,
    '',
  ].join('\n');
}
