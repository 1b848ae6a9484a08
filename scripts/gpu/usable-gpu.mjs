// What every GPU script begins with: is there a GPU that this build can use? Asked through the package
// itself, in a child process, as a pipeline does.
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');

/**
 * The probe's answer (lib/device.ts `CudaProbe`). Where `device` names a GPU and none can be used,
 * prints SKIP with the reasons and ends the process with 0.
 */
export async function usableGpu(device) {
  const { probeCuda } = await import(pathToFileURL(join(root, 'dist', 'device.js')));
  const found = await probeCuda();
  const isUsable = found.reason === '' && found.devices.some((_, i) => !found.problems[i]);
  if (isUsable || !device.startsWith('cuda')) return found;
  console.log(`SKIP: ${[found.reason, ...found.problems].filter(Boolean).join('; ') || 'no GPU'}`);
  process.exit(0);
}
