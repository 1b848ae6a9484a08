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
  /** One line a GPU. */
  readonly devices: readonly string[];
  /** '' or why no GPU can be used. */
  readonly reason: string;
}

/** Reads the machine; replaced in tests. */
export type Prober = () => Promise<CudaProbe>;

// True once this build's CUDA library holds kernels and not only the device query.
const HAS_CUDA_KERNELS = false;
const PROBE_TIMEOUT_MS = 15_000;
const PROBE_MARK = '@turbomind-probe@';
const PROBE_SCRIPT = `
const [addon, library] = process.argv.slice(1);
const answer = require(addon).queryCuda(library);
process.stdout.write('\\n${PROBE_MARK}' + JSON.stringify(answer) + '\\n');
`;

let warned = false;

/**
 * The device to open: at present always 'cpu'.
 * @throws TurbomindError ERR_TM_UNSUPPORTED_DEVICE when 'cuda' was asked for by name.
 */
export async function resolveDevice(device: Device, probe: Prober = probeCuda): Promise<'cpu'> {
  if (device === 'cpu') return 'cpu';
  const found = await probe();
  if (device !== 'auto') throw unsupportedDevice(device, found);
  if (found.devices.length > 0 && !HAS_CUDA_KERNELS) warnUnused(found.devices);
  return 'cpu';
}

function unsupportedDevice(device: Device, found: CudaProbe): TurbomindError {
  const reasons = [
    found.reason,
    ...found.devices.map((line) => `GPU found: ${line}`),
    HAS_CUDA_KERNELS ? '' : 'this version has no CUDA kernels yet',
  ].filter((reason) => reason !== '');
  const remedy = "use device: 'cpu' or 'auto'";
  return new TurbomindError(
    'ERR_TM_UNSUPPORTED_DEVICE',
    `device: ${device} cannot run this build: ${reasons.join('; ')}; ${remedy}`,
  );
}

function warnUnused(devices: readonly string[]): void {
  if (warned) return;
  warned = true;
  process.emitWarning(
    `${devices.length} GPU(s) found (${devices.join('; ')}), but this version has no CUDA kernels ` +
      "yet: running on the CPU. Pass device: 'cpu' to say so without this warning.",
    { type: 'TurbomindWarning', code: 'TM_GPU_UNUSED' },
  );
}

/** Asks the CUDA backend library for GPUs, in a child process. Never rejects. */
export async function probeCuda(): Promise<CudaProbe> {
  const { path } = loadNative();
  const library = findCudaLibrary(path);
  if (library === '')
    return { library, devices: [], reason: 'no CUDA backend library is installed' };
  if (!driverMayExist()) return { library, devices: [], reason: 'no NVIDIA driver is loaded' };
  return { library, ...(await queryInChild(path, library)) };
}

// On Linux a usable GPU always has a device node (native, WSL, Tegra): without one a child process
// would only cost start-up time.
function driverMayExist(): boolean {
  if (process.platform !== 'linux') return true;
  return ['/dev/nvidiactl', '/dev/dxg', '/dev/nvhost-gpu'].some((node) => existsSync(node));
}

function queryInChild(addon: string, library: string): Promise<Omit<CudaProbe, 'library'>> {
  const env = { ...process.env, ELECTRON_RUN_AS_NODE: '1', NODE_OPTIONS: '' };
  const settings = { env, timeout: PROBE_TIMEOUT_MS, killSignal: 'SIGKILL' as const };
  return new Promise((resolve) => {
    execFile(process.execPath, ['-e', PROBE_SCRIPT, addon, library], settings, (error, stdout) => {
      const line = stdout.split('\n').find((text) => text.startsWith(PROBE_MARK));
      if (line !== undefined) resolve(readAnswer(line.slice(PROBE_MARK.length)));
      else resolve({ devices: [], reason: childFailure(error) });
    });
  });
}

function readAnswer(json: string): Omit<CudaProbe, 'library'> {
  const answer: NativeCudaQuery = JSON.parse(json);
  return { devices: answer.devices, reason: answer.error };
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
