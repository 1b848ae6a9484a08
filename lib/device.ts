// Which device a pipeline runs on. 'auto' never fails; a device named outright fails with its
// reasons. The CUDA driver is only ever touched in a child process, because a broken one may
// abort the process that asks; 'cpu' asks nobody. Runs on the JS thread.
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { TurbomindError } from './errors.js';
import { findCudaLibrary, loadNative } from './native.js';
import type { NativeCudaQuery } from './native-types.js';

/** 'auto', 'cpu', 'cuda' (the first GPU) or 'cuda:N'. */
export type Device = 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;

/** What was asked of the machine, and what it answered. */
export interface CudaProbe {
  /** Path of the CUDA backend library; '' when there is none. */
  readonly library: string;
  /** Whether an NVIDIA driver is loaded: someone may expect the GPU to be used. */
  readonly driver: boolean;
  /** One line a GPU. */
  readonly devices: readonly string[];
  /** For each GPU '' or why this build cannot run on it. */
  readonly problems: readonly string[];
  /** '' or why no GPU can be used. */
  readonly reason: string;
}

/** Where a pipeline opens. */
export interface ResolvedDevice {
  readonly device: 'cpu' | `cuda:${number}`;
  /** Path of the CUDA backend library; '' on the CPU. */
  readonly cudaLibrary: string;
}

/** Reads the machine; replaced in tests. */
export type Prober = () => Promise<CudaProbe>;

const CPU: ResolvedDevice = { device: 'cpu', cudaLibrary: '' };
const PROBE_TIMEOUT_MS = 15_000;
const PROBE_MARK = '@turbomind-probe@';
const PROBE_SCRIPT = `
const [addon, library] = process.argv.slice(1);
const answer = require(addon).queryCuda(library);
process.stdout.write('\\n${PROBE_MARK}' + JSON.stringify(answer) + '\\n');
`;

let warned = false;
let usable: Promise<CudaProbe> | undefined;

/**
 * The device to open: for 'auto' the first GPU that works, else the CPU, with one warning a process
 * if there is a driver but no GPU that works.
 * @throws TurbomindError ERR_TM_UNSUPPORTED_DEVICE when 'cuda' was asked for by name.
 */
export async function resolveDevice(
  device: Device,
  probe: Prober = probeOnce,
): Promise<ResolvedDevice> {
  if (device === 'cpu') return CPU;
  const found = await probe();
  const first = found.devices.findIndex((_, index) => isUsable(found, index));
  if (device === 'auto') {
    if (first >= 0) return { device: `cuda:${first}`, cudaLibrary: found.library };
    if (found.driver) warnUnused(found);
    return CPU;
  }
  const index = device === 'cuda' ? Math.max(first, 0) : Number(device.slice('cuda:'.length));
  if (!isUsable(found, index)) throw unsupportedDevice(device, index, found);
  return { device: `cuda:${index}`, cudaLibrary: found.library };
}

function isUsable(found: CudaProbe, index: number): boolean {
  return found.reason === '' && found.devices[index] !== undefined && !found.problems[index];
}

function unsupportedDevice(device: Device, index: number, found: CudaProbe): TurbomindError {
  const missing =
    found.devices.length > 0 && found.devices[index] === undefined
      ? [`there is no GPU ${index}`]
      : [];
  const reasons = [...missing, ...reasonsOf(found)];
  const remedy = "use device: 'cpu' or 'auto'";
  return new TurbomindError(
    'ERR_TM_UNSUPPORTED_DEVICE',
    `device: ${device} cannot be used: ${reasons.join('; ')}; ${remedy}`,
  );
}

function reasonsOf({ reason, devices, problems }: CudaProbe): string[] {
  const lines = devices.map((line, index) => {
    const problem = problems[index];
    return problem ? `GPU ${index} (${line}): ${problem}` : `GPU ${index}: ${line}`;
  });
  return [reason, ...lines].filter((text) => text !== '');
}

function warnUnused(found: CudaProbe): void {
  if (warned) return;
  warned = true;
  process.emitWarning(
    `no GPU can be used, running on the CPU: ${reasonsOf(found).join('; ')}. ` +
      "Pass device: 'cpu' to say so without this warning.",
    { type: 'TurbomindWarning', code: 'TM_GPU_UNUSED' },
  );
}

// A GPU that worked is not asked again; one that did not may have been repaired.
async function probeOnce(): Promise<CudaProbe> {
  usable ??= probeCuda();
  const asked = usable;
  const found = await asked;
  if (!found.devices.some((_, index) => isUsable(found, index)) && usable === asked) {
    usable = undefined;
  }
  return found;
}

/**
 * Asks the CUDA backend library for GPUs, in a child process.
 * @throws BackendNotFoundError when no addon loads; all else is a `reason`.
 */
export async function probeCuda(): Promise<CudaProbe> {
  const { path } = loadNative();
  const library = findCudaLibrary(path);
  const driver = driverMayExist();
  const none = { library, driver, devices: [], problems: [] };
  if (library === '') return { ...none, reason: 'no CUDA backend library is installed' };
  if (!driver) return { ...none, reason: 'no NVIDIA driver is loaded' };
  return { library, driver, ...(await queryInChild(path, library)) };
}

// On Linux a usable GPU always has a device node (native, WSL, Tegra): without one a child process
// would only cost start-up time.
function driverMayExist(): boolean {
  if (process.platform !== 'linux') return true;
  return ['/dev/nvidiactl', '/dev/dxg', '/dev/nvhost-gpu'].some((node) => existsSync(node));
}

type Answer = Omit<CudaProbe, 'library' | 'driver'>;

/** Asks the library in a child process, whose end is an answer too. */
export function queryInChild(addon: string, library: string): Promise<Answer> {
  const env = { ...process.env, ELECTRON_RUN_AS_NODE: '1', NODE_OPTIONS: '' };
  const settings = { env, timeout: PROBE_TIMEOUT_MS, killSignal: 'SIGKILL' as const };
  return new Promise((resolve) => {
    execFile(process.execPath, ['-e', PROBE_SCRIPT, addon, library], settings, (error, stdout) => {
      resolve(readAnswer(stdout) ?? { devices: [], problems: [], reason: childFailure(error) });
    });
  });
}

// A child that was ended may have written half an answer, which is none.
function readAnswer(stdout: string): Answer | undefined {
  const line = stdout.split('\n').find((text) => text.startsWith(PROBE_MARK));
  if (line === undefined) return undefined;
  try {
    const answer: NativeCudaQuery = JSON.parse(line.slice(PROBE_MARK.length));
    return { devices: answer.devices, problems: answer.problems, reason: answer.error };
  } catch {
    return undefined;
  }
}

function childFailure(
  error:
    | (Error & { signal?: NodeJS.Signals | null | undefined; killed?: boolean | undefined })
    | null,
): string {
  if (error?.killed === true) return `the GPU test did not end within ${PROBE_TIMEOUT_MS / 1000} s`;
  if (error?.signal) return `the GPU test was ended by ${error.signal}: the driver may be broken`;
  return `the GPU test failed: ${error?.message.split('\n').at(-1) ?? 'no answer'}`;
}
