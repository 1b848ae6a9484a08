import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test, vi } from 'vitest';
import { type CudaProbe, queryInChild, resolveDevice } from '../../lib/device.js';

const LIBRARY = '/lib/libturbomind_cuda.so';
const H100 = 'NVIDIA H100, sm_90, 79.6 GiB';
const OLD = 'Tesla P100, sm_60, 16.0 GiB';
const TOO_OLD = 'compute capability 6.0; 8.0 or newer is needed';

function probe(answer: Partial<CudaProbe>) {
  const devices = answer.devices ?? [];
  const problems = devices.map(() => '');
  return vi.fn(async () => ({
    library: LIBRARY,
    driver: true,
    devices,
    problems,
    reason: '',
    ...answer,
  }));
}

test("'cpu' asks nobody", async () => {
  const prober = probe({});
  expect(await resolveDevice('cpu', prober)).toEqual({ device: 'cpu', cudaLibrary: '' });
  expect(prober).not.toHaveBeenCalled();
});

test("'auto' and 'cuda' take the first GPU that works", async () => {
  const one = probe({ devices: [H100] });
  const mixed = probe({ devices: [OLD, H100], problems: [TOO_OLD, ''] });
  for (const name of ['auto', 'cuda'] as const) {
    expect(await resolveDevice(name, one)).toEqual({ device: 'cuda:0', cudaLibrary: LIBRARY });
    expect(await resolveDevice(name, mixed)).toEqual({ device: 'cuda:1', cudaLibrary: LIBRARY });
  }
});

test("'cuda:N' takes that GPU", async () => {
  const prober = probe({ devices: [H100, H100] });
  expect((await resolveDevice('cuda:1', prober)).device).toBe('cuda:1');
});

test("'auto' without a driver is the CPU, silently", async () => {
  const warn = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined);
  const prober = probe({ driver: false, reason: 'no NVIDIA driver is loaded' });
  expect((await resolveDevice('auto', prober)).device).toBe('cpu');
  expect(warn).not.toHaveBeenCalled();
  warn.mockRestore();
});

test("'auto' with a driver but no GPU that works warns once, with the reasons", async () => {
  const warn = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined);
  const prober = probe({ devices: [OLD], problems: [TOO_OLD] });
  const cpu = { device: 'cpu', cudaLibrary: '' };
  expect(await resolveDevice('auto', prober)).toEqual(cpu);
  expect(await resolveDevice('auto', probe({ reason: 'the GPU test was ended' }))).toEqual(cpu);
  expect(warn).toHaveBeenCalledTimes(1);
  expect(warn.mock.calls[0]?.[0]).toContain(OLD);
  expect(warn.mock.calls[0]?.[0]).toContain(TOO_OLD);
  warn.mockRestore();
});

test.each([
  ['cuda', { reason: 'no CUDA backend library is installed' }, 'no CUDA backend library'],
  ['cuda:1', { reason: 'the GPU test was ended by SIGSEGV' }, 'SIGSEGV'],
  ['cuda', { devices: [OLD], problems: [TOO_OLD] }, '8.0 or newer'],
  ['cuda:0', { devices: [OLD, H100], problems: [TOO_OLD, ''] }, '8.0 or newer'],
  ['cuda:2', { devices: [H100, H100] }, 'there is no GPU 2'],
] as const)("'%s' by name is an error with the reasons: %j", async (name, answer, reason) => {
  await expect(resolveDevice(name, probe(answer))).rejects.toMatchObject({
    code: 'ERR_TM_UNSUPPORTED_DEVICE',
    message: expect.stringMatching(`${name} cannot.*${reason}.*device: 'cpu'`),
  });
});

test.each([
  ['answers', 'return { devices: ["a"], problems: [""], error: "" };', ['a'], ''],
  ['is killed', 'process.kill(process.pid, "SIGKILL");', [], 'ended by SIGKILL'],
  [
    'ends in the middle of its answer',
    'process.stdout.write("@turbomind-probe@{\\"dev"); process.exit(0);',
    [],
    'no answer',
  ],
] as const)('a probe that %s is an answer', async (_, body, devices, reason) => {
  const folder = await mkdtemp(join(tmpdir(), 'turbomind-probe-'));
  const addon = join(folder, 'addon.cjs');
  try {
    await writeFile(addon, `exports.queryCuda = () => { ${body} };`);
    const answer = await queryInChild(addon, LIBRARY);
    expect(answer.devices).toEqual(devices);
    expect(answer.reason).toContain(reason);
  } finally {
    await rm(folder, { recursive: true });
  }
});
