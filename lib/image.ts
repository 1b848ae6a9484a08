// Any picture a user names → 8-bit RGB pixels, as Pillow's open → exif_transpose → convert('RGB')
// gives them: orientation first, alpha dropped, palettes and grey expanded, colour profiles left
// alone. Limits are checked before pixels are decoded. Cutting into tiles is native. sharp is
// loaded at the first picture; it decodes on its own threads, this file runs on the JS thread.
import { readFile, stat } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import type { Metadata, Sharp, SharpOptions } from 'sharp';
import { decodeDataUrl, parseDataUrl } from './data-url.js';
import { TurbomindError } from './errors.js';
import { fetchBytes } from './image-fetch.js';
import { ownPixels, rgbOfCmyk } from './image-pixels.js';
import { isSharpLike } from './message-parts.js';
import type { ImageSource, RawImage, SharpLike } from './prompts.js';

/** Decoded pixels, [height, width, channels]; nobody else writes to them or takes them away. */
export interface Image {
  readonly data: Uint8Array;
  readonly width: number;
  readonly height: number;
  readonly channels: 1 | 3 | 4;
}

/** Limits of what a picture may cost. */
export interface ImageLimits {
  readonly maxPixels: number;
  readonly maxBytes: number;
  readonly timeoutMs: number;
}

// What Pillow reads too, and libvips reads without running a document renderer.
const FORMATS: ReadonlySet<string> = new Set([
  'jpeg',
  'png',
  'webp',
  'gif',
  'tiff',
  'heif',
  'avif',
]);

/** What a picture is made of: a file's bytes or raw pixels. */
export interface PictureBytes {
  /** Perhaps still the caller's memory. */
  readonly bytes: Uint8Array;
  /** How they are to be read: the same bytes in another form are another picture. */
  readonly form: string;
  /** The bytes that are decoded: nobody else writes to them or takes them away. Copied at most once. */
  own(): Promise<Uint8Array>;
}

/** A picture that has been read and not yet decoded. */
export interface Picture {
  /** Undefined where only decoding tells. */
  readonly source: PictureBytes | undefined;
  /** @throws TurbomindError ERR_TM_INVALID_IMAGE */
  decode(): Promise<Image>;
}

/**
 * Reads one picture.
 * @throws TurbomindError ERR_TM_INVALID_IMAGE or ERR_TM_IMAGE_FETCH
 */
export async function readPicture(
  source: ImageSource,
  limits: ImageLimits,
  signal?: AbortSignal,
): Promise<Picture> {
  if (isRaw(source)) {
    const { width, height, channels, data } = checkRaw(source, limits);
    const own = once(() => ownPixels(data));
    const decode = async () => ({ width, height, channels, data: await own() });
    return { source: { bytes: data, form: `${width} x ${height} x ${channels}`, own }, decode };
  }
  if (isSharp(source)) {
    return { source: undefined, decode: () => decodeInstance(source, limits) };
  }
  const name = nameOf(source);
  const bytes = await readSource(source, limits, signal);
  if (bytes.length === 0) throw invalid(`${name} is empty`);
  const own = once(async () => (bytes === source ? await ownPixels(bytes) : bytes));
  const decode = async () => await decodeBytes(await own(), name, limits);
  return { source: { bytes, form: 'file', own }, decode };
}

function once<T>(make: () => Promise<T>): () => Promise<T> {
  let made: Promise<T> | undefined;
  return () => {
    made ??= make();
    return made;
  };
}

function isRaw(source: ImageSource): source is RawImage {
  return typeof source === 'object' && 'data' in source && 'width' in source && 'height' in source;
}

// isSharpLike checks the methods a batch of prompts is sorted by; decoding needs the whole class.
function isSharp(source: ImageSource): source is Sharp {
  return isSharpLike(source) && 'autoOrient' in source && 'clone' in source;
}

function checkRaw(raw: RawImage, limits: ImageLimits): Image {
  const { data, width, height } = raw;
  if (!(data instanceof Uint8Array)) throw invalid('raw image: data must be a Uint8Array');
  if (!isSide(width) || !isSide(height)) {
    throw invalid(`raw image: ${width} x ${height} is not a size; expected whole pixels above 0`);
  }
  checkPixels('raw image', width, height, limits);
  const { channels } = raw;
  if (channels !== 1 && channels !== 3 && channels !== 4) {
    throw invalid(`raw image: ${channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)`);
  }
  const wanted = width * height * channels;
  if (data.length !== wanted) {
    const shape = `${width} x ${height} x ${channels}`;
    throw invalid(`raw image: ${data.length} bytes for ${shape}; expected ${wanted}`);
  }
  return { data, width, height, channels };
}

function isSide(value: unknown): boolean {
  return typeof value === 'number' && Number.isInteger(value) && value > 0;
}

function nameOf(source: string | URL | Uint8Array | SharpLike | RawImage): string {
  if (source instanceof Uint8Array) return `image of ${source.length} bytes`;
  const text = String(source);
  if (/^data:/i.test(text)) return 'data URL image';
  return `image ${text.length > 200 ? `${text.slice(0, 197)}…` : text}`;
}

async function readSource(
  source: ImageSource,
  limits: ImageLimits,
  signal: AbortSignal | undefined,
): Promise<Uint8Array> {
  if (source instanceof Uint8Array) return source;
  if (typeof source !== 'string' && !(source instanceof URL)) {
    throw invalid(
      `image: ${typeof source} is not a picture; expected a path, a URL, bytes, ` +
        '{ data, width, height, channels } or a sharp instance',
    );
  }
  const text = String(source);
  if (/^https?:/i.test(text)) return await fetchBytes(text, limits, signal);
  if (/^data:/i.test(text)) {
    const parts = parseDataUrl(text);
    checkBytes('data URL image', parts.bytes, limits);
    return await decodeDataUrl(parts);
  }
  if (/^file:/i.test(text)) return await readPath(toPath(text), limits);
  if (source instanceof URL) {
    throw invalid(
      `image ${text}: ${source.protocol} is not read; expected http, https, file or data`,
    );
  }
  return await readPath(text, limits);
}

function toPath(url: string): string {
  try {
    return fileURLToPath(url);
  } catch (error) {
    throw invalid(`image ${url}: not a file URL of this machine`, error);
  }
}

async function readPath(path: string, limits: ImageLimits): Promise<Uint8Array> {
  try {
    const found = await stat(path);
    // A pipe or a device may never end: whoever trusts one reads it and passes the bytes.
    if (!found.isFile()) throw invalid(`image ${path}: not a file; pass a picture's path or bytes`);
    checkBytes(`image ${path}`, found.size, limits);
    return await readFile(path);
  } catch (error) {
    if (error instanceof TurbomindError) throw error;
    const reason = error instanceof Error && 'code' in error ? String(error.code) : String(error);
    throw invalid(`image ${path}: cannot be read (${reason})`, error);
  }
}

async function decodeBytes(bytes: Uint8Array, name: string, limits: ImageLimits): Promise<Image> {
  const sharp = await importSharp();
  const settings: SharpOptions = { failOn: 'error', ignoreIcc: true, limitInputPixels: false };
  try {
    const image = sharp(bytes, settings);
    const metadata = await image.metadata();
    checkFormat(name, metadata);
    checkPixels(name, metadata.width, metadata.height, limits);
    return await toRgb(image.autoOrient(), metadata);
  } catch (error) {
    throw asInvalid(name, error);
  }
}

async function decodeInstance(instance: Sharp, limits: ImageLimits): Promise<Image> {
  const name = 'sharp image';
  try {
    const metadata = await instance.metadata();
    checkPixels(name, metadata.width, metadata.height, limits);
    const image = await toRgb(instance.clone().autoOrient(), { ...metadata, space: 'srgb' });
    checkPixels(name, image.width, image.height, limits);
    return image;
  } catch (error) {
    throw asInvalid(name, error);
  }
}

function checkFormat(name: string, metadata: Metadata): void {
  if (FORMATS.has(metadata.format)) return;
  throw invalid(`${name}: ${metadata.format} is not read; expected ${[...FORMATS].join(', ')}`);
}

async function toRgb(image: Sharp, metadata: Pick<Metadata, 'space'>): Promise<Image> {
  if (metadata.space === 'cmyk') return await cmykToRgb(image);
  const { data, info } = await image
    .removeAlpha()
    .toColourspace('srgb')
    .raw({ depth: 'uchar' })
    .toBuffer({ resolveWithObject: true });
  const { width, height, channels } = info;
  if (channels !== 1 && channels !== 3) throw invalid(`${channels} channels after decoding`);
  return { data, width, height, channels };
}

// libvips would go through a printing profile. Measured: identical bytes for JPEG and TIFF.
async function cmykToRgb(image: Sharp): Promise<Image> {
  const { data, info } = await image
    .pipelineColourspace('cmyk')
    .toColourspace('cmyk')
    .raw({ depth: 'uchar' })
    .toBuffer({ resolveWithObject: true });
  const { width, height, channels } = info;
  return { data: await rgbOfCmyk(data, channels), width, height, channels: 3 };
}

function checkPixels(name: string, width: number, height: number, limits: ImageLimits): void {
  if (width * height <= limits.maxPixels) return;
  throw invalid(
    `${name}: ${width} x ${height} pixels are more than maxImagePixels (${limits.maxPixels}); ` +
      'make it smaller, or raise maxImagePixels for pictures you trust',
  );
}

function checkBytes(name: string, bytes: number, limits: ImageLimits): void {
  if (bytes <= limits.maxBytes) return;
  throw invalid(
    `${name}: ${Math.round(bytes)} bytes are more than imageFetch.maxBytes (${limits.maxBytes}); ` +
      'make it smaller, or raise imageFetch.maxBytes for pictures you trust',
  );
}

function invalid(message: string, cause?: unknown): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_IMAGE', message, cause === undefined ? {} : { cause });
}

function asInvalid(name: string, error: unknown): TurbomindError {
  if (error instanceof TurbomindError) return error;
  const reason = error instanceof Error ? error.message.split('\n', 1)[0] : String(error);
  return invalid(`${name}: cannot be decoded (${reason})`, error);
}

async function importSharp(): Promise<typeof import('sharp').default> {
  try {
    return (await import('sharp')).default;
  } catch (error) {
    throw invalid(
      'image: the sharp package, which decodes pictures, could not be loaded; reinstall it for this ' +
        'platform, or pass raw pixels',
      error,
    );
  }
}
