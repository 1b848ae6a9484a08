// The tiles of the last pictures: who is cut again, who is not, and how much is kept.
import { createHash } from 'node:crypto';
import { expect, test } from 'vitest';
import type { Picture } from '../../lib/image.js';
import type { NativeTileOptions, NativeTiles } from '../../lib/native-types.js';
import { TileCache } from '../../lib/tile-cache.js';

const OPTIONS: NativeTileOptions = { tileSize: 4, minTiles: 1, maxTiles: 12, useThumbnail: true };
const TILE_BYTES = 4 * 4 * 3;

let numCut = 0;
const cut = async (): Promise<NativeTiles> => {
  numCut += 1;
  return {
    columns: 1,
    rows: 1,
    numTiles: 1,
    tileSize: 4,
    pixels: () => new Uint8Array(TILE_BYTES),
    contentHash: String(numCut),
  };
};
const decode = () => Promise.reject(new Error('not decoded here'));
function picture(values: readonly number[], form = 'file'): Picture {
  const bytes = Uint8Array.from(values);
  return { source: { bytes, form, own: async () => bytes }, decode };
}
const hash = async (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex');
const newCache = (maxBytes?: number) => new TileCache(hash, maxBytes);
/** Whether the cache cut the picture now. */
async function cuts(cache: TileCache, of: Picture, options = OPTIONS): Promise<boolean> {
  const before = numCut;
  await cache.get(of, options, cut);
  return numCut > before;
}

test('the same bytes, read and cut in the same way, are cut once', async () => {
  const cache = newCache();
  const first = await cache.get(picture([1, 2, 3]), OPTIONS, cut);
  expect(await cache.get(picture([1, 2, 3]), OPTIONS, cut)).toBe(first);
  expect(await cuts(cache, picture([1, 2, 4]))).toBe(true);
  expect(await cuts(cache, picture([1, 2, 3], '1 x 1 x 3'))).toBe(true);
  expect(await cuts(cache, picture([1, 2, 3]), { ...OPTIONS, maxTiles: 6 })).toBe(true);
  expect(await cuts(cache, picture([1, 2, 3]), { ...OPTIONS, useThumbnail: false })).toBe(true);
  expect(await cuts(cache, picture([1, 2, 3]))).toBe(false);
  expect(await cuts(cache, picture([1, 2, 4]))).toBe(false);
});

test('a picture without a source is always cut', async () => {
  const cache = newCache();
  expect(await cuts(cache, { source: undefined, decode })).toBe(true);
  expect(await cuts(cache, { source: undefined, decode })).toBe(true);
  expect(cache.bytes).toBe(0);
});

test('the least recently used go first, and no more is kept than said', async () => {
  const cache = newCache(2 * TILE_BYTES);
  await cuts(cache, picture([1]));
  await cuts(cache, picture([2]));
  expect(await cuts(cache, picture([1]))).toBe(false);
  await cuts(cache, picture([3]));
  expect(cache.bytes).toBe(2 * TILE_BYTES);
  expect(await cuts(cache, picture([1]))).toBe(false);
  expect(await cuts(cache, picture([2]))).toBe(true);
  const none = newCache(TILE_BYTES - 1);
  expect(await cuts(none, picture([1]))).toBe(true);
  expect(await cuts(none, picture([1]))).toBe(true);
  expect(none.bytes).toBe(0);
});

test('requests side by side for one picture leave one entry', async () => {
  const cache = newCache();
  await Promise.all([1, 2, 3].map(() => cache.get(picture([7, 7]), OPTIONS, cut)));
  expect(cache.bytes).toBe(TILE_BYTES);
  expect(await cuts(cache, picture([7, 7]))).toBe(false);
});

test('a cut that fails is not kept', async () => {
  const cache = newCache();
  const failing = cache.get(picture([1]), OPTIONS, () => Promise.reject(new Error('broken')));
  await expect(failing).rejects.toThrow('broken');
  expect(await cuts(cache, picture([1]))).toBe(true);
});

test('random use: every answer is of the picture asked for, bytes stay within the limit', async () => {
  const cache = newCache(5 * TILE_BYTES);
  const content = new Map<string, number>();
  for (let i = 0; i < 2000; i += 1) {
    const which = Math.floor(((i * 7919) % 97) / 9);
    const tiles = await cache.get(picture([which, which % 3]), OPTIONS, async () => {
      const made = await cut();
      content.set(made.contentHash, which);
      return made;
    });
    expect(content.get(tiles.contentHash)).toBe(which);
    expect(cache.bytes).toBeLessThanOrEqual(5 * TILE_BYTES);
  }
});

test('tiles are filed under what was cut, not under what the caller held before', async () => {
  const cache = newCache();
  await cuts(cache, picture([1, 1]));
  const bytes = Uint8Array.from([2, 2]);
  const own = async () => Uint8Array.from([3, 3]); // written to after it was looked for
  await cuts(cache, { source: { bytes, form: 'file', own }, decode });
  expect(await cuts(cache, picture([3, 3]))).toBe(false);
  expect(await cuts(cache, picture([2, 2]))).toBe(true);
});

test('a picture that is known is not copied', async () => {
  const cache = newCache();
  await cuts(cache, picture([1, 2]));
  const own = () => Promise.reject(new Error('copied'));
  const bytes = Uint8Array.from([1, 2]);
  expect(await cuts(cache, { source: { bytes, form: 'file', own }, decode })).toBe(false);
});
