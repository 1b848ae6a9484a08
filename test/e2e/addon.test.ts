// The N-API border by itself: argument errors, tiles on native threads, several environments, exits.
// Engines are tested where there is a model to open.
import { spawnSync } from 'node:child_process';
import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import { ADDON_PATH, addon, failureOf, tileOptions } from './support/addon.js';
import { openOptions } from './support/open-options.js';

/** Types may lie in plain JavaScript; the border must not believe them. */
function lie<T>(value: unknown): T {
  return value as T;
}

const OPEN_OPTIONS = openOptions({
  spec: {
    decoder: {
      hiddenSize: 64,
      numLayers: 1,
      numHeads: 1,
      numKvHeads: 1,
      headDim: 64,
      intermediateSize: 64,
      vocabSize: 16,
      maxPositionEmbeddings: 128,
      normEps: 1e-6,
      ropeTheta: 10_000,
      qkvBias: true,
      qkNorm: false,
      tiedEmbeddings: true,
    },
    quant: { method: 'none', groupSize: 0 },
    imageTokenId: -1,
  },
  files: [],
  tensors: [],
});

const ignore = (): void => undefined;

function gradient(width: number, height: number, channels: number): Uint8Array {
  const pixels = new Uint8Array(width * height * channels);
  for (let i = 0; i < pixels.length; i++) pixels[i] = i * 31;
  return pixels;
}

describe('machine', () => {
  it('has the version of package.json', async () => {
    const { default: manifest } = await import('../../package.json', { with: { type: 'json' } });
    expect(addon.version).toBe(manifest.version);
  });

  it('describes the processor and the memory', () => {
    const info = addon.cpuInfo();
    expect(['scalar', 'avx2', 'avx512', 'amx']).toContain(info.isa);
    expect(info.features.every((name) => typeof name === 'string')).toBe(true);
    expect(info.threads).toBeGreaterThanOrEqual(1);
    expect(info.totalMemoryBytes).toBeGreaterThan(1e8);
    expect(info.freeMemoryBytes).toBeGreaterThan(0);
    expect(info.freeMemoryBytes).toBeLessThanOrEqual(info.totalMemoryBytes);
  });

  it('says why a CUDA library cannot be used', async () => {
    const missing = addon.queryCuda('/nowhere/libturbomind_cuda.so');
    expect(missing).toMatchObject({ deviceCount: 0, devices: [] });
    expect(missing.error).toContain('/nowhere/libturbomind_cuda.so');
    expect(addon.queryCuda(ADDON_PATH).error).toContain('turbomind_cuda_query is missing');
    expect((await failureOf(() => addon.queryCuda(lie(7)))).message).toContain('libraryPath');
  });
});

describe('argument errors name the field', () => {
  const pixels = gradient(4, 4, 3);
  const cases: readonly [string, () => unknown, string][] = [
    ['pixels', () => addon.makeTiles(lie([1, 2]), 4, 4, 3, tileOptions()), 'makeTiles: pixels'],
    [
      'another view',
      () => addon.makeTiles(lie(new Int8Array(48)), 4, 4, 3, tileOptions()),
      'makeTiles: pixels',
    ],
    ['width', () => addon.makeTiles(pixels, lie('4'), 4, 3, tileOptions()), 'makeTiles: width'],
    ['height', () => addon.makeTiles(pixels, 4, 4.5, 3, tileOptions()), 'makeTiles: height'],
    ['NaN', () => addon.makeTiles(pixels, Number.NaN, 4, 3, tileOptions()), 'makeTiles: width'],
    ['options', () => addon.makeTiles(pixels, 4, 4, 3, lie(null)), 'makeTiles: options'],
    [
      'tileSize',
      () => addon.makeTiles(pixels, 4, 4, 3, tileOptions({ tileSize: lie('x') })),
      'makeTiles: options.tileSize',
    ],
    [
      'useThumbnail',
      () => addon.chooseGrid(4, 4, tileOptions({ useThumbnail: lie(1) })),
      'chooseGrid: options.useThumbnail',
    ],
    ['range', () => addon.chooseGrid(4, 4, tileOptions({ maxTiles: 0 })), 'maxTiles 0'],
    ['outWidth', () => addon.resizeBicubic(pixels, 4, 4, lie({}), 4), 'resizeBicubic: outWidth'],
    [
      'hiddenSize',
      () =>
        addon.open(
          {
            ...OPEN_OPTIONS,
            spec: {
              ...OPEN_OPTIONS.spec,
              decoder: { ...OPEN_OPTIONS.spec.decoder, hiddenSize: lie('64') },
            },
          },
          ignore,
          ignore,
        ),
      "open: options.spec.decoder.hiddenSize: expected an integer of 32 bits, got '64'",
    ],
    [
      'tensor file',
      () =>
        addon.open(
          {
            ...OPEN_OPTIONS,
            files: ['/nowhere'],
            tensors: [{ name: 'x', dtype: 'f32', shape: [1], file: 1, offset: 0, bytes: 4 }],
          },
          ignore,
          ignore,
        ),
      'open: options.tensors[0].file: expected an integer from 0 to 0, got 1',
    ],
    [
      'tensor dtype',
      () =>
        addon.open(
          {
            ...OPEN_OPTIONS,
            files: ['/nowhere'],
            tensors: [{ name: 'x', dtype: lie('f64'), shape: [1], file: 0, offset: 0, bytes: 4 }],
          },
          ignore,
          ignore,
        ),
      "open: options.tensors[0].dtype: expected 'f32', 'f16', 'bf16' or 'i32', got 'f64'",
    ],
    ['onEvents', () => addon.open(OPEN_OPTIONS, lie(undefined), ignore), 'open: onEvents'],
    ['onProgress', () => addon.open(OPEN_OPTIONS, ignore, lie('x')), 'open: onProgress'],
  ];
  it.each(cases)('%s', async (_, run, part) => {
    const { code, message } = await failureOf(run);
    expect(code).toBe('ERR_TM_INVALID_ARGUMENT');
    expect(message).toContain(part);
  });

  it('promises reject and never throw', () => {
    const promise = addon.makeTiles(lie(undefined), 1, 1, 3, tileOptions());
    expect(promise).toBeInstanceOf(Promise);
    return expect(promise).rejects.toMatchObject({ code: 'ERR_TM_INVALID_ARGUMENT' });
  });

  it('a getter that throws is answered with its own error', async () => {
    const options = {
      ...tileOptions(),
      get maxTiles(): number {
        throw new RangeError('mine');
      },
    };
    expect((await failureOf(() => addon.chooseGrid(1, 1, options))).message).toBe('mine');
  });

  it('a checkpoint that cannot be opened rejects with a code', async () => {
    const options = { ...OPEN_OPTIONS, files: ['/nowhere/model.safetensors'] };
    expect((await failureOf(() => addon.open(options, ignore, ignore))).code).toMatch(/^ERR_TM_/);
  });
});

describe('bad images', () => {
  it.each([
    [0, 4, 3, 0],
    [70_000, 1, 3, 210_000],
    [4, 4, 2, 32],
    [4, 4, 3, 47],
    [4, 4, 3, 49],
    [60_000, 60_000, 3, 48],
    [-4, 4, 3, 48],
  ])('%i x %i x %i in %i bytes', async (width, height, channels, bytes) => {
    const pixels = new Uint8Array(bytes);
    const run = () => addon.makeTiles(pixels, width, height, channels, tileOptions());
    expect((await failureOf(run)).code).toBe('ERR_TM_INVALID_IMAGE');
  });
});

describe('tiles', () => {
  it('many at once resolve in any order and equal those made alone', async () => {
    const sizes = Array.from({ length: 24 }, (_, i) => [100 + 37 * i, 640 - 19 * i] as const);
    const run = ([width, height]: readonly [number, number]) =>
      addon.makeTiles(gradient(width, height, 3), width, height, 3, tileOptions({ tileSize: 112 }));
    const together = await Promise.all(sizes.map(run));
    for (const [i, size] of sizes.entries()) {
      const alone = await run(size);
      expect(together[i]?.contentHash).toBe(alone.contentHash);
      expect(Buffer.compare(together[i]?.pixels() ?? Buffer.of(), alone.pixels())).toBe(0);
    }
    expect(new Set(together.map((tiles) => tiles.contentHash)).size).toBe(24);
  });

  it('hand out copies', async () => {
    const pixels = gradient(300, 200, 3);
    const tiles = await addon.makeTiles(pixels, 300, 200, 3, tileOptions({ tileSize: 56 }));
    const before = tiles.pixels();
    tiles.pixels().fill(0);
    expect(Buffer.compare(tiles.pixels(), before)).toBe(0);
  });

  it('content hash is of the pixels and the grid', async () => {
    const run = (pixels: Uint8Array, width: number, height: number) =>
      addon.makeTiles(pixels, width, height, 1, tileOptions({ tileSize: 8, maxTiles: 2 }));
    const grey = new Uint8Array(128).fill(9);
    const wide = await run(grey, 16, 8);
    expect(wide.contentHash).toMatch(/^[0-9a-f]{32}$/);
    expect((await run(grey, 16, 8)).contentHash).toBe(wide.contentHash);
    expect((await run(grey, 8, 16)).contentHash).not.toBe(wide.contentHash);
    grey[77] = 10;
    expect((await run(grey, 16, 8)).contentHash).not.toBe(wide.contentHash);
  });

  it('names of bytes are fixed by content, order and cut', async () => {
    const bytes = gradient(100, 100, 3);
    const name = addon.hashBytes(bytes, '');
    expect(name).toMatch(/^[0-9a-f]{32}$/);
    expect(addon.hashBytes(bytes.slice(), '')).toBe(name);
    const rest = (cut: number) =>
      addon.hashBytes(bytes.subarray(cut), addon.hashBytes(bytes.subarray(0, cut), ''));
    expect(new Set([name, rest(0), rest(4096), rest(8192)]).size).toBe(4);
    expect(rest(4096)).toBe(rest(4096));
    for (const previous of ['12', 'x'.repeat(32), lie<string>(undefined)]) {
      const failure = await failureOf(async () => addon.hashBytes(bytes, previous));
      expect(failure.code).toBe('ERR_TM_INVALID_ARGUMENT');
    }
    expect((await failureOf(async () => addon.hashBytes(lie([1]), ''))).code).toBe(
      'ERR_TM_INVALID_ARGUMENT',
    );
  });

  it('cannot be forged or constructed', async () => {
    const tiles = await addon.makeTiles(gradient(4, 4, 1), 4, 4, 1, tileOptions({ tileSize: 8 }));
    const TilesClass: new () => unknown = lie(tiles.constructor);
    expect((await failureOf(() => new TilesClass())).code).toBe('ERR_TM_INVALID_ARGUMENT');
    const prototype: object = Object.getPrototypeOf(tiles);
    for (const name of ['columns', 'rows', 'numTiles', 'tileSize', 'contentHash']) {
      const getter = Object.getOwnPropertyDescriptor(prototype, name)?.get;
      expect(() => getter?.call({}), name).toThrow();
      expect(() => getter?.call(Object.create(tiles)), name).toThrow();
    }
    expect(() => tiles.pixels.call(lie({}))).toThrow();
  });

  it('the event loop stays free while tiles are made', async () => {
    const pixels = gradient(2000, 1500, 3);
    let settled = false;
    const work = Promise.all(
      Array.from({ length: 8 }, () => addon.makeTiles(pixels, 2000, 1500, 3, tileOptions())),
    ).finally(() => {
      settled = true;
    });
    let turns = 0;
    while (!settled) {
      await new Promise((resolve) => setImmediate(resolve));
      turns += 1;
    }
    await work;
    expect(turns).toBeGreaterThan(20);
  });
});

describe('environments', () => {
  const WORKER = `
    const { parentPort, workerData } = require('node:worker_threads');
    const addon = require(workerData.path);
    const pixels = new Uint8Array(900 * 700 * 3).fill(5);
    const options = { tileSize: 224, minTiles: 1, maxTiles: 12, useThumbnail: true };
    const run = () => addon.makeTiles(pixels, 900, 700, 3, options);
    if (workerData.endless) {
      const again = () => run().then(again);
      for (let i = 0; i < 8; i++) again();
      parentPort.postMessage('busy');
    } else {
      Promise.all([run(), run()]).then((all) => parentPort.postMessage(all[1].contentHash));
    }`;
  const start = (endless: boolean) =>
    new Worker(WORKER, { eval: true, workerData: { path: ADDON_PATH, endless } });
  const message = (worker: Worker) =>
    new Promise<unknown>((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
    });
  const exit = (worker: Worker) => new Promise((resolve) => worker.once('exit', resolve));

  it('two workers and the main thread use it side by side and end by themselves', async () => {
    const workers = [start(false), start(false)];
    const exits = workers.map(exit);
    const hashes = await Promise.all(workers.map(message));
    const pixels = new Uint8Array(900 * 700 * 3).fill(5);
    const own = await addon.makeTiles(pixels, 900, 700, 3, tileOptions({ tileSize: 224 }));
    expect(hashes).toEqual([own.contentHash, own.contentHash]);
    expect(await Promise.all(exits)).toEqual([0, 0]);
  });

  it('workers may be terminated while their tiles are being made', async () => {
    for (let round = 0; round < 5; round++) {
      const workers = [start(true), start(true)];
      await Promise.all(workers.map(message));
      expect(await Promise.all(workers.map((worker) => worker.terminate()))).toEqual([1, 1]);
    }
  });

  const child = (code: string) =>
    spawnSync(process.execPath, ['-e', code], {
      encoding: 'utf8',
      timeout: 30_000,
      env: { ...process.env, ADDON_PATH },
    });
  const PRELUDE = `const addon = require(process.env.ADDON_PATH);
    const pixels = new Uint8Array(2000 * 1500 * 3);
    const run = () => addon.makeTiles(pixels, 2000, 1500, 3,
      { tileSize: 448, minTiles: 1, maxTiles: 12, useThumbnail: true });`;

  it('a process ends by itself once its tiles are made', () => {
    const result = child(`${PRELUDE} run().then((tiles) => console.log(tiles.numTiles));`);
    expect([result.status, result.signal, result.stdout]).toEqual([0, null, '13\n']);
  });

  it('process.exit while tiles are being made is clean', () => {
    const result = child(`${PRELUDE} for (let i = 0; i < 6; i++) run(); process.exit(3);`);
    expect([result.status, result.signal, result.stderr]).toEqual([3, null, '']);
  });

  it('pixels that nobody else holds are kept until their tiles are made, and no longer', () => {
    const result = spawnSync(
      process.execPath,
      [
        '--expose-gc',
        '-e',
        `const addon = require(process.env.ADDON_PATH);
        const make = () => addon.makeTiles(new Uint8Array(2000 * 1500 * 3).fill(7), 2000, 1500, 3,
          { tileSize: 56, minTiles: 1, maxTiles: 12, useThumbnail: true });
        const collect = async () => {
          for (let i = 0; i < 3; i++) { gc(); await new Promise((done) => setImmediate(done)); }
          return process.memoryUsage().arrayBuffers;
        };
        (async () => {
          const before = await collect();
          const made = Array.from({ length: 8 }, make);
          gc(); // nothing has settled: no turn has passed
          const during = process.memoryUsage().arrayBuffers;
          const hashes = new Set((await Promise.all(made)).map((tiles) => tiles.contentHash));
          const after = await collect();
          console.log(hashes.size, during - before >= 72e6, after - before < 9e6);
        })();`,
      ],
      { encoding: 'utf8', timeout: 60_000, env: { ...process.env, ADDON_PATH } },
    );
    expect([result.status, result.stderr, result.stdout]).toEqual([0, '', '1 true true\n']);
  });

  it('tiles return their memory when collected', () => {
    const result = spawnSync(
      process.execPath,
      [
        '--expose-gc',
        '-e',
        `${PRELUDE}
        (async () => {
          let before = 0;
          for (let i = 0; i < 60; i++) {
            await run();
            if (i === 20) { gc(); before = process.memoryUsage().rss; }
          }
          gc();
          await new Promise((resolve) => setImmediate(resolve));
          gc();
          console.log((process.memoryUsage().rss - before) >> 20);
        })();`,
      ],
      { encoding: 'utf8', timeout: 60_000, env: { ...process.env, ADDON_PATH } },
    );
    expect([result.status, result.stderr]).toEqual([0, '']);
    // 40 more images of 7.8 MB each were made: keeping them would be over 300 MiB.
    expect(Number(result.stdout)).toBeLessThan(100);
  });
});
