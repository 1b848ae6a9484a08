// Tiles of the last pictures, found again by the hash of a picture's bytes and how it is cut: the second
// question about a picture neither copies, decodes nor cuts it. JS thread. What is computed from tiles
// is shared natively (native/runtime/image_store.h).
import type { Picture, PictureBytes } from './image.js';
import type { NativeTileOptions, NativeTiles } from './native-types.js';

/** Five pictures of 13 tiles of 448 pixels, dozens of the embedded model's. */
const DEFAULT_BYTES = 64 * 2 ** 20;

/** Names bytes; two that differ never share a name. */
export type HashBytes = (bytes: Uint8Array) => Promise<string>;

export class TileCache {
  readonly #hash: HashBytes;
  readonly #maxBytes: number;
  /** Least recently used first. */
  readonly #tiles = new Map<string, NativeTiles>();
  /** How many of them have this shape: only then is it worth waiting for a hash. */
  readonly #shapes = new Map<string, number>();
  #bytes = 0;

  /** `maxBytes`: of all tiles kept. */
  constructor(hash: HashBytes, maxBytes: number = DEFAULT_BYTES) {
    this.#hash = hash;
    this.#maxBytes = maxBytes;
  }

  /** Bytes of the tiles kept. */
  get bytes(): number {
    return this.#bytes;
  }

  /** The picture's tiles: those kept, or what `cut` answers. A picture without a source is always cut. */
  async get(
    picture: Picture,
    options: NativeTileOptions,
    cut: () => Promise<NativeTiles>,
  ): Promise<NativeTiles> {
    const { source } = picture;
    if (source === undefined) return await cut();
    const shape = shapeOf(source, options);
    if (this.#shapes.has(shape)) {
      const hash = await this.#hash(source.bytes);
      const tiles = this.#take(shape, hash);
      if (tiles !== undefined) {
        this.#keep(shape, hash, tiles);
        return tiles;
      }
    }
    // Filed under what was cut: the caller may have written to its memory since.
    const hashing = source.own().then((bytes) => this.#hash(bytes));
    const [tiles, hash] = await Promise.all([cut(), hashing]);
    this.#keep(shape, hash, tiles);
    return tiles;
  }

  #take(shape: string, hash: string): NativeTiles | undefined {
    const key = keyOf(shape, hash);
    const tiles = this.#tiles.get(key);
    if (tiles === undefined) return undefined;
    this.#tiles.delete(key);
    this.#bytes -= bytesOf(tiles);
    const others = (this.#shapes.get(shape) ?? 1) - 1;
    if (others > 0) this.#shapes.set(shape, others);
    else this.#shapes.delete(shape);
    return tiles;
  }

  #keep(shape: string, hash: string, tiles: NativeTiles): void {
    this.#take(shape, hash); // of another request for the same picture
    if (bytesOf(tiles) > this.#maxBytes) return;
    this.#tiles.set(keyOf(shape, hash), tiles);
    this.#shapes.set(shape, (this.#shapes.get(shape) ?? 0) + 1);
    this.#bytes += bytesOf(tiles);
    for (const oldest of this.#tiles.keys()) {
      if (this.#bytes <= this.#maxBytes) break;
      const end = oldest.lastIndexOf('/');
      this.#take(oldest.slice(0, end), oldest.slice(end + 1));
    }
  }
}

const keyOf = (shape: string, hash: string): string => `${shape}/${hash}`;

function bytesOf({ numTiles, tileSize }: NativeTiles): number {
  return numTiles * tileSize * tileSize * 3;
}

function shapeOf({ bytes, form }: PictureBytes, options: NativeTileOptions): string {
  const { tileSize, minTiles, maxTiles, useThumbnail } = options;
  return [form, bytes.length, tileSize, minTiles, maxTiles, useThumbnail].join(' ');
}
