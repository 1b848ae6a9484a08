// Types of step-table.mjs, for its test.
export interface DecoderShape {
  hidden: number;
  mlp: number;
  layers: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  vocab: number;
  kvBytes: number;
  weightBits: number;
}
export interface Kernel {
  name: string;
  begin: number;
  end: number;
  grid: [number, number, number];
  inGraph: boolean;
}
export interface Step {
  kernels: Kernel[];
  begin: number;
  decode: boolean;
  us: number;
}
export interface Row {
  kernel: string;
  count: number;
  usEach: number;
  usTotal: number;
  GBs?: number;
  copyShare?: number;
  TFLOPs?: number;
  bf16Share?: number;
}
export function shortName(mangled: string): string;
export function readTrace(file: string): Kernel[];
export function splitSteps(kernels: Kernel[]): Step[];
export function tableOf(
  steps: Step[],
  shape: DecoderShape,
  sizes: { rows: number; context: number; batch: number },
  peaks: { copyTBs: number; bf16TFLOPs: number },
): { stepUs: number; kernels: number; kernelsPerLayer: number; idleUs: number; rows: Row[] };
