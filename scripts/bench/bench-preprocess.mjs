// Speed of the native preprocessing against Pillow + numpy, in the same run on the same machine.
//
//   npm run bench:preprocess -- [--json] [--sizes 1920x1080,4000x3000] [--repeats 15]
//
// Ours makes 8-bit tiles with a content hash; the normalisation happens in the vision tower, where
// the patch embedding reads them. Pillow's figure is given with and without its float32
// normalisation, so both comparisons can be read. Times are medians and include, for ours, the copy
// of the pixels out of JavaScript. Ours is measured in child processes bound to one and to two
// processors (taskset), as images after each other (latency) and four at a time (throughput).
// On a machine that others use, compare the processor time of an image: it hardly moves.
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { cpus } from 'node:os';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const TILE = 448;
const MAX_TILES = 12;
const ADDON = fileURLToPath(new URL('../../build/Release/turbomind.node', import.meta.url));
const PYTHON = process.env.TURBOMIND_PYTHON ?? '/usr/bin/python3';

const { values } = parseArgs({
  options: {
    json: { type: 'boolean', default: false },
    sizes: { type: 'string', default: '900x900,1920x1080,4000x3000' },
    repeats: { type: 'string', default: '15' },
    child: { type: 'boolean', default: false },
  },
});
const sizes = values.sizes.split(',');
const repeats = Number(values.repeats);

const median = (numbers) => numbers.sort((a, b) => a - b)[Math.floor(numbers.length / 2)];

async function measureOurs() {
  const addon = createRequire(import.meta.url)(ADDON);
  const options = { tileSize: TILE, minTiles: 1, maxTiles: MAX_TILES, useThumbnail: true };
  const results = {};
  for (const size of sizes) {
    const [width, height] = size.split('x').map(Number);
    const pixels = new Uint8Array(width * height * 3);
    let state = 1;
    for (let i = 0; i < pixels.length; i++) {
      state = (Math.imul(state, 1664525) + 1013904223) | 0;
      pixels[i] = state >>> 24;
    }
    const run = () => addon.makeTiles(pixels, width, height, 3, options);
    let tiles = await run(); // warm
    const alone = [];
    for (let i = 0; i < repeats; i++) {
      const start = performance.now();
      tiles = await run();
      alone.push(performance.now() - start);
    }
    const start = performance.now();
    const cpuBefore = process.cpuUsage();
    let left = 2 * repeats;
    const lane = async () => {
      while (left-- > 0) await run();
    };
    await Promise.all([lane(), lane(), lane(), lane()]);
    const throughput = (performance.now() - start) / (2 * repeats);
    const cpu = process.cpuUsage(cpuBefore);
    results[size] = {
      tiles: tiles.numTiles,
      latency_ms: median(alone),
      throughput_ms: throughput,
      cpu_ms: (cpu.user + cpu.system) / 1000 / (2 * repeats),
    };
  }
  console.log(JSON.stringify(results));
}

function runChild(command, args) {
  const child = spawnSync(command, args, { encoding: 'utf8', maxBuffer: 1 << 24 });
  if (child.status !== 0) return undefined;
  return JSON.parse(child.stdout.trim().split('\n').at(-1));
}

function bound(processors) {
  const self = fileURLToPath(import.meta.url);
  const args = ['--child', '--sizes', values.sizes, '--repeats', values.repeats];
  return runChild('taskset', ['-c', processors, process.execPath, self, ...args]);
}

function report() {
  const script = fileURLToPath(new URL('bench_preprocess.py', import.meta.url));
  const settings = [String(TILE), String(MAX_TILES), String(Math.max(3, Math.ceil(repeats / 3)))];
  const one = bound('0');
  const two = cpus().length > 1 ? bound('0,1') : undefined;
  const pillow = runChild(PYTHON, [script, ...settings, ...sizes]);
  if (!one) throw new Error('taskset or the addon is missing; run npm run build:native first');
  if (!pillow) console.error(`SKIP: ${PYTHON} has no Pillow or numpy; measuring ours alone`);

  const rate = (ms) => (ms === undefined ? undefined : Number((1000 / ms).toFixed(1)));
  const rows = sizes.map((size) => {
    const normalised = pillow?.results[size].normalised_ms;
    const best = (two ?? one)[size].throughput_ms;
    return {
      size,
      tiles: one[size].tiles,
      'Pillow+numpy img/s': rate(normalised),
      'Pillow alone img/s': rate(pillow?.results[size].tiles_ms),
      'ours 1 thread img/s': rate(one[size].throughput_ms),
      'ours 2 threads img/s': rate(two?.[size].throughput_ms),
      'ours latency 2 threads ms': two && Number(two[size].latency_ms.toFixed(1)),
      'Pillow+numpy CPU ms': pillow && Number(pillow.results[size].cpu_ms.toFixed(1)),
      'Pillow alone CPU ms': pillow && Number(pillow.results[size].tiles_cpu_ms.toFixed(1)),
      'ours CPU ms': Number(one[size].cpu_ms.toFixed(1)),
      'times Pillow+numpy': normalised && Number((normalised / best).toFixed(1)),
    };
  });
  const result = {
    cpu: cpus()[0]?.model,
    tile: TILE,
    maxTiles: MAX_TILES,
    pillow: pillow?.pillow,
    numpy: pillow?.numpy,
    rows,
  };
  if (!values.json) console.table(rows);
  console.log(JSON.stringify(result));
}

if (values.child) await measureOurs();
else report();
