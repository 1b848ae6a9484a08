// The tables of GPU steps: from the tracer's records to rows that sum to the step.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import {
  type Kernel,
  readTrace,
  shortName,
  splitSteps,
  tableOf,
} from '../../scripts/gpu/step-table.mjs';

const mangled = (file: string, name: string) =>
  `_ZN9turbomind4cuda${file.length}${file}${name.length}${name}EPKtllPKiPtiPKtllPKiPti`;
const POINTWISE = '_GLOBAL__N__d90a7184_12_pointwise_cu_2ec0c1c6';

const shape = {
  hidden: 128,
  mlp: 256,
  layers: 1,
  heads: 2,
  kvHeads: 2,
  headDim: 64,
  vocab: 100,
  kvBytes: 2,
  weightBits: 4.25,
};

let folder = '';
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'tm-step-table-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

test.each([
  [mangled(POINTWISE, 'unpack_step_kernel'), 'unpack_step_kernel'],
  [mangled('_GLOBAL__N__1_7_norm_cu_fae96498', 'norm_kernel'), 'norm_kernel'],
  ['_ZN9turbomind4cuda11norm_kernelI6__halfLb0EEEvNS0_8NormArgsE', 'norm_kernel'],
  ['memset', 'memset'],
])('a mangled name gives the function its own: %s', (name, expected) => {
  expect(shortName(name)).toBe(expected);
});

test('kernels that overlap, their gaps and the step add up', () => {
  const at = (name: string, begin: number, end: number, graph: number) =>
    JSON.stringify({ n: mangled(POINTWISE, name), s: begin, e: end, x: 2, y: 1, z: 1, g: graph });
  const step = (t: number) => [
    at('unpack_step_kernel', t, t + 1000, 0),
    at('embed_kernel', t + 4000, t + 5000, 1), // 3 us idle before it
    at('u4_stream_kernel', t + 4500, t + 15000, 2), // starts early: 10 us of its own
    at('decode_kernel', t + 15000, t + 20000, 3),
  ];
  const file = join(folder, 'trace');
  const clock = JSON.stringify({ clock: 0, realtime: 0 });
  writeFileSync(file, [clock, ...step(0), ...step(30_000)].join('\n'));
  const steps = splitSteps(readTrace(file));
  expect(steps.map(({ us, decode }) => ({ us, decode }))).toEqual([
    { us: 20, decode: true },
    { us: 20, decode: true },
  ]);
  const sizes = { rows: 2, context: 1000, batch: 2 };
  const table = tableOf(steps, shape, sizes, { copyTBs: 3, bf16TFLOPs: 700 });
  expect(table.idleUs).toBe(3);
  const us = Object.fromEntries(table.rows.map(({ kernel, usTotal }) => [kernel, usTotal]));
  expect(us).toEqual({
    'qkv (u4_stream_kernel)': 10,
    'decode attention': 5,
    unpack_step_kernel: 1,
    embed_kernel: 1,
  });
  expect(table.idleUs + table.rows.reduce((sum, { usTotal }) => sum + usTotal, 0)).toBe(20);
  const attention = table.rows.find(({ kernel }) => kernel === 'decode attention');
  expect(attention?.GBs).toBeCloseTo((2 * 2 * 2 * 64 * 1000 * 2) / 5000, 6);
});

test('prefill attention counts half a square of keys, pointwise kernels the rows they read and write', () => {
  const kernels = ['norm_kernel', 'rope_kv_kernel', 'prefill_sm90_kernel', 'scan_kernel'].map(
    (name, i): Kernel => ({
      name,
      begin: i * 1000,
      end: i * 1000 + 1000,
      grid: [1, 1, 1],
      inGraph: false,
    }),
  );
  const step = { kernels, begin: 0, decode: false, us: 4 };
  const sizes = { rows: 50, context: 100, batch: 1 };
  const { rows } = tableOf([step], shape, sizes, { copyTBs: 3, bf16TFLOPs: 700 });
  const row = (name: string) => rows.find(({ kernel }) => kernel === name);
  expect(row('prefill attention')?.TFLOPs).toBeCloseTo((4 * 2 * 64 * (50 * 50)) / 2 / 1e6, 9);
  expect(row('norm_kernel')?.GBs).toBeCloseTo((50 * 128 * 2 * 2) / 1000, 9);
  expect(row('rope_kv_kernel')?.GBs).toBeCloseTo((50 * (4 * 128 + 4 * 256)) / 1000, 9);
  expect(row('scan_kernel')?.GBs).toBeCloseTo((100 * 4) / 1000, 9);
});
