// How fast a checkpoint is loaded, against the disk and the bus, as JSON: from the page cache, and cold,
// with the files' pages dropped before. Without a usable GPU it prints SKIP and exits 0.
//   node scripts/gpu/bench-load.mjs MODEL [--peaks PEAKS.json] [--repeats 3] [--cold 2]
//     [--swap BYTES] [--cached] [--out FILE]
// --peaks is what device_peaks.py wrote on this machine: its pinned upload is the bus. The disk is what 16
// plain reads of 4 MiB at a time get from the same files, measured between the cold loads. A virtual
// disk may keep a cache of its own: compare cold loads with the reads beside them only. --cached: the files
// have just been written or read, so they are not read once more before the first load. weightsMs is
// the time at which the last weight was reported, of openMs.
import { execFileSync, spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { open, readdir, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';

const READERS = 16;
const PIECE = 4 << 20;

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    peaks: { type: 'string' },
    repeats: { type: 'string', default: '3' },
    cold: { type: 'string', default: '2' },
    device: { type: 'string', default: 'cuda' },
    session: { type: 'string', default: '2048' },
    swap: { type: 'string' },
    cached: { type: 'boolean', default: false },
    out: { type: 'string' },
  },
});
const model = positionals[0];
if (!model) throw new Error('usage: bench-load.mjs MODEL [options]; see the head of this file');
if (Number(process.env.UV_THREADPOOL_SIZE ?? 4) < READERS) {
  const env = { ...process.env, UV_THREADPOOL_SIZE: String(READERS) };
  const child = spawnSync(process.execPath, process.argv.slice(1), { env, stdio: 'inherit' });
  process.exit(child.status ?? 1);
}
const { pipeline } = await import(pathToFileURL(join(root, 'dist', 'index.js')));
const { probeCuda } = await import(pathToFileURL(join(root, 'dist', 'device.js')));
if (flags.device.startsWith('cuda')) {
  const found = await probeCuda();
  if (!found.devices.some((_, i) => found.reason === '' && !found.problems[i])) {
    console.log(
      `SKIP: ${[found.reason, ...found.problems].filter(Boolean).join('; ') || 'no GPU'}`,
    );
    process.exit(0);
  }
}

const round = (value) => Number(value.toFixed(3));
const median = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)];
const files = (await readdir(model))
  .filter((name) => name.endsWith('.safetensors'))
  .map((name) => join(model, name));
if (files.length === 0) throw new Error(`${model} holds no .safetensors file`);

// Written pages must reach the disk before they can be dropped.
function dropPages() {
  for (const file of files) {
    execFileSync('sync', [file]);
    execFileSync('dd', [`if=${file}`, 'iflag=nocache', 'count=0', 'status=none']);
  }
}

async function plainRead() {
  const begin = performance.now();
  let bytes = 0;
  for (const file of files) {
    const handle = await open(file);
    const { size } = await handle.stat();
    let next = 0;
    const reader = async () => {
      const buffer = Buffer.allocUnsafeSlow(PIECE);
      for (let at = next; at < size; at = next) {
        next += PIECE;
        const { bytesRead } = await handle.read(buffer, 0, PIECE, at);
        bytes += bytesRead;
      }
    };
    await Promise.all(Array.from({ length: READERS }, reader));
    await handle.close();
  }
  return { bytes, gbPerSecond: round(bytes / 1e6 / (performance.now() - begin)) };
}

async function load() {
  const begin = performance.now();
  let weightsMs = 0;
  const pipe = await pipeline(model, {
    onProgress: () => {
      weightsMs = performance.now() - begin;
    },
    device: flags.device,
    sessionLen: Number(flags.session),
    maxBatchSize: 8,
    ...(flags.swap === undefined ? {} : { swapSpaceBytes: Number(flags.swap) }),
  });
  const openMs = performance.now() - begin;
  const { loadMs, deviceName } = pipe.stats();
  await pipe.close();
  return { openMs: round(openMs), weightsMs: round(weightsMs), loadMs: round(loadMs), deviceName };
}

const sizeOf = async (file) => (await stat(file)).size;
const bytes = flags.cached
  ? (await Promise.all(files.map(sizeOf))).reduce((sum, size) => sum + size, 0)
  : (await plainRead()).bytes; // into the page cache
const gbPerSecond = ({ loadMs }) => round(bytes / 1e6 / loadMs);
const warm = [];
for (let i = 0; i < Number(flags.repeats); i += 1) {
  warm.push(await load());
  console.log(JSON.stringify({ warm: gbPerSecond(warm.at(-1)), ...warm.at(-1) }));
}
const cold = [];
const disk = [];
for (let i = 0; i < Number(flags.cold); i += 1) {
  dropPages();
  cold.push(await load());
  dropPages();
  disk.push((await plainRead()).gbPerSecond);
  console.log(
    JSON.stringify({ cold: gbPerSecond(cold.at(-1)), disk: disk.at(-1), ...cold.at(-1) }),
  );
}
const report = {
  model,
  device: warm[0]?.deviceName,
  gigabytes: round(bytes / 1e9),
  warmGBs: round(median(warm.map(gbPerSecond))),
  warm,
};
if (flags.peaks) {
  report.uploadGBs = round(JSON.parse(readFileSync(flags.peaks, 'utf8')).uploadGBs);
  report.warmShareOfUpload = round(report.warmGBs / report.uploadGBs);
}
if (cold.length > 0) {
  Object.assign(report, { coldGBs: cold.map(gbPerSecond), diskGBs: disk, cold });
  report.coldShareOfDisk = round(median(report.coldGBs) / median(disk));
}
console.log(JSON.stringify(report));
if (flags.out) writeFileSync(flags.out, `${JSON.stringify(report, null, 1)}\n`);
