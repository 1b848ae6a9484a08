// `turbomind-node doctor`: what this machine offers, which binaries load and why others do not.
// Never fails because of what it finds missing; exits 1 when no addon loads. Main thread.
import { availableParallelism, cpus, freemem, release, totalmem } from 'node:os';
import { probeCuda } from '../device.js';
import { BackendNotFoundError, type LoadAttempt } from '../errors.js';
import { type LoadedNative, loadNative, packageVersion } from '../native.js';
import type { NativeCpuInfo } from '../native-types.js';
import { EXIT, formatBytes, printJson, printRows } from './output.js';

export interface DoctorFlags {
  readonly json?: boolean;
}

interface Report {
  readonly version: string;
  readonly node: string;
  readonly platform: string;
  readonly cpu: { readonly model: string; readonly threads: number } & Partial<NativeCpuInfo>;
  readonly memory: { readonly totalBytes: number; readonly freeBytes: number };
  readonly addon: { readonly path: string | null; readonly attempts: readonly LoadAttempt[] };
  readonly gpu: {
    readonly library: string;
    readonly devices: readonly string[];
    readonly problems: readonly string[];
    readonly reason: string;
  };
  readonly sharp: string;
}

export async function doctor(flags: DoctorFlags): Promise<void> {
  const report = await examine();
  if (flags.json) printJson(report);
  else printRows(toRows(report));
  if (report.addon.path === null) process.exitCode = EXIT.failed;
}

async function examine(): Promise<Report> {
  const native = tryNative();
  const cpu = native.loaded?.addon.cpuInfo();
  return {
    version: packageVersion(),
    node: process.versions.node,
    platform: `${process.platform}-${process.arch}, kernel ${release()}`,
    cpu: { model: cpus()[0]?.model ?? 'unknown', threads: availableParallelism(), ...cpu },
    memory: {
      totalBytes: cpu?.totalMemoryBytes ?? totalmem(),
      freeBytes: cpu?.freeMemoryBytes ?? freemem(),
    },
    addon: { path: native.loaded?.path ?? null, attempts: native.attempts },
    gpu:
      native.loaded === undefined
        ? { library: '', devices: [], problems: [], reason: 'not asked: no addon loads' }
        : await probeCuda(),
    sharp: await sharpVersion(),
  };
}

function tryNative(): { loaded: LoadedNative | undefined; attempts: readonly LoadAttempt[] } {
  try {
    const loaded = loadNative();
    return { loaded, attempts: loaded.attempts };
  } catch (error) {
    if (!(error instanceof BackendNotFoundError)) throw error;
    return { loaded: undefined, attempts: error.attempts };
  }
}

async function sharpVersion(): Promise<string> {
  try {
    const { versions } = (await import('sharp')).default;
    return `sharp ${versions.sharp ?? '?'}, libvips ${versions.vips}`;
  } catch (error) {
    return `does not load: ${error instanceof Error ? error.message.split('\n', 1)[0] : error}`;
  }
}

function gpuRows({ devices, problems, reason }: Report['gpu']): [string, string][] {
  if (devices.length === 0) return [['gpu', `none: ${reason}`]];
  return devices.map((line, index) => {
    const problem = problems[index];
    return [`cuda:${index}`, problem ? `${line}: cannot be used: ${problem}` : line];
  });
}

function toRows(report: Report): [string, string][] {
  const { cpu, memory, addon, gpu } = report;
  const refused = addon.attempts.map(({ path, reason }): [string, string] => [
    'refused',
    `${path}: ${reason}`,
  ]);
  return [
    ['turbomind-node', report.version],
    ['node', report.node],
    ['platform', report.platform],
    ['cpu', `${cpu.model}, ${cpu.threads} thread(s) usable`],
    ['instruction set', cpu.isa ?? 'unknown: no addon loads'],
    ['features', cpu.features?.join(' ') ?? 'unknown'],
    ['memory', `${formatBytes(memory.freeBytes)} free of ${formatBytes(memory.totalBytes)}`],
    ['addon', addon.path ?? 'none loads'],
    ...refused,
    ['cuda library', gpu.library === '' ? 'none' : gpu.library],
    ...gpuRows(gpu),
    ['pictures', report.sharp],
  ];
}
