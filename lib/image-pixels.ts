// Whole pictures' bytes, worked on in slices on the JS thread, so that token streams keep flowing
// beside a picture of a hundred megabytes. Where pixels come from and what is accepted: lib/image.ts.
import { TurbomindError } from './errors.js';
import type { NativeAddon } from './native-types.js';
import { PICTURE_SLICE_MS, Turns } from './turns.js';

/** A piece takes under a millisecond even when its memory is touched for the first time. */
const PIECE_BYTES = 1 << 19;

/**
 * A copy that is ours: native threads read it in place, and a caller may write to pixels of its own
 * or transfer them at any time.
 * @throws TurbomindError ERR_TM_INVALID_IMAGE when the memory is taken away while it is read.
 */
export async function ownPixels(
  data: Uint8Array,
  turns: Turns = new Turns(PICTURE_SLICE_MS),
): Promise<Uint8Array> {
  const copy = Buffer.allocUnsafeSlow(data.length);
  await eachPiece(data, turns, (piece, begin) => copy.set(piece, begin));
  return copy;
}

/**
 * A name of these bytes: 32 hex digits, another one in every process (native/image/content_hash.h).
 * The bytes are read where they are, each once; at memory's speed, so copying them to hash them on
 * another thread would keep this one longer.
 * @throws TurbomindError ERR_TM_INVALID_IMAGE when the memory is taken away while it is read.
 */
export async function hashOf(
  addon: Pick<NativeAddon, 'hashBytes'>,
  data: Uint8Array,
  turns: Turns = new Turns(PICTURE_SLICE_MS),
): Promise<string> {
  let hash = '';
  await eachPiece(data, turns, (piece) => {
    hash = addon.hashBytes(piece, hash);
  });
  return hash;
}

async function eachPiece(
  data: Uint8Array,
  turns: Turns,
  work: (piece: Uint8Array, begin: number) => void,
): Promise<void> {
  const { length } = data;
  for (let begin = 0; begin < length; begin += PIECE_BYTES) {
    await turns.giveWay();
    if (data.length !== length) {
      throw new TurbomindError(
        'ERR_TM_INVALID_IMAGE',
        'image: its memory was transferred or resized while it was read; keep it until the ' +
          'answer begins',
      );
    }
    work(data.subarray(begin, Math.min(begin + PIECE_BYTES, length)), begin);
  }
}

/**
 * RGB of CMYK pixels, the way Pillow multiplies by the black channel: (255 - k) - c * (255 - k) / 255,
 * rounded. `channels`: bytes of a pixel of `data`, 4 or more.
 */
export async function rgbOfCmyk(data: Uint8Array, channels: number): Promise<Uint8Array> {
  const numPixels = Math.floor(data.length / channels);
  const rgb = new Uint8Array(numPixels * 3);
  const turns = new Turns(PICTURE_SLICE_MS);
  const step = PIECE_BYTES >> 4; // far slower a byte than a copy
  for (let begin = 0; begin < numPixels; begin += step) {
    await turns.giveWay();
    const end = Math.min(begin + step, numPixels);
    for (let pixel = begin; pixel < end; pixel += 1) {
      const from = pixel * channels;
      const white = 255 - (data[from + 3] ?? 0);
      for (let channel = 0; channel < 3; channel += 1) {
        const product = (data[from + channel] ?? 0) * white + 128;
        rgb[pixel * 3 + channel] = white - ((product + (product >> 8)) >> 8);
      }
    }
  }
  return rgb;
}
