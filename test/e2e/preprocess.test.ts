// The native preprocessing through the addon, against Pillow: the golden tiles of the fixture, and
// random images that /usr/bin/python3 makes while the test runs.
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import sharp from 'sharp';
import { describe, expect, it } from 'vitest';
import { addon, tileOptions } from './support/addon.js';

const FIXTURES = new URL('../fixtures/', import.meta.url);
const PYTHON = process.env.TURBOMIND_PYTHON ?? '/usr/bin/python3';
const SEED = 20260711;
const SECONDS = 12;

interface GoldenImage {
  readonly file: string;
  readonly size: readonly [number, number];
  readonly rgb_sha256: string;
  readonly columns: number;
  readonly rows: number;
  readonly tiles: readonly string[];
}

interface Golden {
  readonly sizes: readonly {
    readonly width: number;
    readonly height: number;
    readonly columns: number;
    readonly rows: number;
  }[];
  readonly images: readonly GoldenImage[];
}

const golden: Golden = JSON.parse(
  readFileSync(new URL('tiny-internvl/preprocess.json', FIXTURES), 'utf8'),
);

function sha256(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

describe('golden images', () => {
  it.each(golden.images)('$file gives the reference tiles, bit for bit', async (image) => {
    const { data, info } = await sharp(
      fileURLToPath(new URL(`tiny-internvl/${image.file}`, FIXTURES)),
    )
      .autoOrient()
      .toColourspace('srgb')
      .removeAlpha()
      .raw()
      .toBuffer({ resolveWithObject: true });
    expect([info.width, info.height, info.channels]).toEqual([...image.size, 3]);
    // libvips and Pillow bring different JPEG decoders; on these pictures they agree to the bit.
    // Should that end, this line fails first and says that decoding is to blame, not tiling.
    expect(sha256(data), 'decoded pixels').toBe(image.rgb_sha256);

    const options = tileOptions({ tileSize: 224 });
    const tiles = await addon.makeTiles(data, info.width, info.height, 3, options);
    expect([tiles.columns, tiles.rows]).toEqual([image.columns, image.rows]);
    expect(tiles.numTiles).toBe(image.tiles.length);
    const pixels = tiles.pixels();
    const bytes = 224 * 224 * 3;
    expect(pixels.length).toBe(tiles.numTiles * bytes);
    const hashes = image.tiles.map((_, i) => sha256(pixels.subarray(i * bytes, (i + 1) * bytes)));
    expect(hashes).toEqual(image.tiles);
  });

  it('chooses the reference grid for every golden size', () => {
    expect(golden.sizes).toHaveLength(40);
    for (const { width, height, columns, rows } of golden.sizes) {
      const grid = addon.chooseGrid(width, height, tileOptions({ tileSize: 224 }));
      expect(grid, `${width} x ${height}`).toEqual({ columns, rows });
    }
  });
});

/** One case of test/fixtures/pillow_tiles.py. */
interface PillowCase {
  readonly mode: string;
  readonly width: number;
  readonly height: number;
  readonly channels: number;
  readonly bytes: number;
  readonly rgbBytes: number;
  readonly resize: { readonly width: number; readonly height: number; readonly sha256: string };
  readonly tiles: {
    readonly tileSize: number;
    readonly minTiles: number;
    readonly maxTiles: number;
    readonly useThumbnail: boolean;
    readonly columns: number;
    readonly rows: number;
    readonly sha256: string;
  };
}

/** Hands out the bytes of a stream by length or by line. */
class ByteReader {
  readonly #chunks: AsyncIterator<Buffer>;
  #buffer: Buffer = Buffer.alloc(0);

  constructor(source: AsyncIterable<Buffer>) {
    this.#chunks = source[Symbol.asyncIterator]();
  }

  async bytes(count: number): Promise<Buffer> {
    const parts = [this.#buffer];
    let length = this.#buffer.length;
    while (length < count) {
      const next = await this.#chunks.next();
      if (next.done) throw new Error('the stream ended within a case');
      parts.push(next.value);
      length += next.value.length;
    }
    const all = Buffer.concat(parts);
    this.#buffer = all.subarray(count);
    return all.subarray(0, count);
  }

  /** Undefined at the end of the stream. */
  async line(): Promise<string | undefined> {
    let end = this.#buffer.indexOf(10);
    while (end < 0) {
      const next = await this.#chunks.next();
      if (next.done) return undefined;
      this.#buffer = Buffer.concat([this.#buffer, next.value]);
      end = this.#buffer.indexOf(10);
    }
    return (await this.bytes(end + 1)).toString('utf8');
  }
}

async function checkCase(one: PillowCase, given: Uint8Array, rgb: Uint8Array): Promise<void> {
  const { width, height, resize, tiles: want } = one;
  const label = JSON.stringify(one);
  const resized = addon.resizeBicubic(rgb, width, height, resize.width, resize.height);
  expect(sha256(resized), label).toBe(resize.sha256);
  const tiles = await addon.makeTiles(given, width, height, one.channels, {
    tileSize: want.tileSize,
    minTiles: want.minTiles,
    maxTiles: want.maxTiles,
    useThumbnail: want.useThumbnail,
  });
  expect([tiles.columns, tiles.rows], label).toEqual([want.columns, want.rows]);
  expect(sha256(tiles.pixels()), label).toBe(want.sha256);
}

const pillow = spawnSync(PYTHON, ['-c', 'import PIL; print(PIL.__version__)'], {
  encoding: 'utf8',
});
const hasPillow = pillow.status === 0;
if (!hasPillow) console.log(`SKIP: ${PYTHON} has no Pillow (Debian: python3-pil)`);

describe('property test against Pillow', () => {
  it.skipIf(!hasPillow)(
    `random images of all modes, seed ${SEED}`,
    { timeout: 60_000 },
    async () => {
      const script = fileURLToPath(new URL('pillow_tiles.py', FIXTURES));
      const python = spawn(PYTHON, [script, String(SEED), String(SECONDS)], {
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      const exit = new Promise<number | null>((resolve) => python.once('exit', resolve));
      const reader = new ByteReader(python.stdout);
      const modes = new Map<string, number>();
      try {
        for (let line = await reader.line(); line !== undefined; line = await reader.line()) {
          const one: PillowCase = JSON.parse(line);
          const given = await reader.bytes(one.bytes);
          await checkCase(one, given, await reader.bytes(one.rgbBytes));
          modes.set(one.mode, (modes.get(one.mode) ?? 0) + 1);
        }
      } finally {
        python.kill();
      }
      expect(await exit).toBe(0);
      const counts = [...modes].map(([mode, count]) => `${mode} ${count}`).join(', ');
      console.log(`Pillow ${pillow.stdout.trim()}: equal on ${counts}`);
      expect(modes.size).toBe(7);
    },
  );
});
