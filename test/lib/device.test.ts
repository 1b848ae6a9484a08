import { expect, test, vi } from 'vitest';
import { type CudaProbe, resolveDevice } from '../../lib/device.js';

function probe(answer: Partial<CudaProbe>) {
  return vi.fn(async () => ({ library: '', devices: [], reason: '', ...answer }));
}

test("'cpu' asks nobody", async () => {
  const prober = probe({});
  expect(await resolveDevice('cpu', prober)).toBe('cpu');
  expect(prober).not.toHaveBeenCalled();
});

test("'auto' without a GPU is the CPU, silently", async () => {
  const warn = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined);
  expect(await resolveDevice('auto', probe({ reason: 'no driver' }))).toBe('cpu');
  expect(warn).not.toHaveBeenCalled();
  warn.mockRestore();
});

test("'auto' with a GPU that this build cannot use warns once", async () => {
  const warn = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined);
  const prober = probe({ devices: ['NVIDIA H100'] });
  expect(await resolveDevice('auto', prober)).toBe('cpu');
  expect(await resolveDevice('auto', prober)).toBe('cpu');
  expect(warn).toHaveBeenCalledTimes(1);
  expect(warn.mock.calls[0]?.[0]).toContain('NVIDIA H100');
  warn.mockRestore();
});

test.each(['cuda', 'cuda:1'] as const)(
  "'%s' by name is an error with the reasons",
  async (name) => {
    const asked = resolveDevice(name, probe({ reason: 'no CUDA backend library is installed' }));
    await expect(asked).rejects.toMatchObject({
      code: 'ERR_TM_UNSUPPORTED_DEVICE',
      message: expect.stringMatching(`${name}.*no CUDA backend library.*device: 'cpu'`),
    });
  },
);
