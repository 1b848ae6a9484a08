// The parts of a message's content: texts and pictures in our form and in OpenAI's, each turned into one
// form or refused at its place. What a picture's source holds is lib/image.ts's. Pure functions.
import { isJsonObject } from './checkpoint/json.js';
import { describe, invalidPrompt, rejectUnknownKeys, wellFormed } from './prompt-check.js';
import type { ImageSource, RawImage, SharpLike, TextPart } from './prompts.js';

/** A picture at its place in a message, after normalisation. */
export interface ImagePart {
  readonly type: 'image';
  readonly image: ImageSource;
  readonly maxDynamicPatch?: number;
}

export type ContentPart = TextPart | ImagePart;

/** Most tiles for OpenAI's `detail`; the numbers are LMDeploy's. */
const DETAIL_TILES: ReadonlyMap<string, number> = new Map([
  ['low', 6],
  ['medium', 12],
  ['high', 24],
]);

/** @param where the part's place in the prompt, for errors. @throws TurbomindError ERR_TM_INVALID_PROMPT */
export function readPart(value: unknown, where: string): ContentPart {
  if (!isJsonObject(value)) {
    throw invalidPrompt(
      `${where} is ${describe(value)}; expected a part such as { type: 'text', text }`,
    );
  }
  switch (value.type) {
    case 'text':
      rejectUnknownKeys(value, ['type', 'text'], where);
      if (typeof value.text !== 'string') {
        throw invalidPrompt(`${where}.text is ${describe(value.text)}; expected a string`);
      }
      return { type: 'text', text: wellFormed(value.text, `${where}.text`) };
    case 'image_url':
      rejectUnknownKeys(value, ['type', 'image_url'], where);
      return readImageUrl(value.image_url, `${where}.image_url`);
    case 'image':
      rejectUnknownKeys(value, ['type', 'image', 'maxDynamicPatch'], where);
      return imagePart(
        readImage(value.image, `${where}.image`),
        readTileLimit(value.maxDynamicPatch, `${where}.maxDynamicPatch`),
      );
    default:
      throw invalidPrompt(
        `${where}.type is ${describe(value.type)}; expected 'text', 'image_url' or 'image'`,
      );
  }
}

function readImageUrl(value: unknown, where: string): ImagePart {
  if (typeof value === 'string') return imagePart(readImage(value, where), undefined);
  if (!isJsonObject(value)) {
    throw invalidPrompt(`${where} is ${describe(value)}; expected { url } or a string`);
  }
  rejectUnknownKeys(value, ['url', 'detail', 'max_dynamic_patch'], where);
  if (typeof value.url !== 'string') {
    throw invalidPrompt(`${where}.url is ${describe(value.url)}; expected a string`);
  }
  const limits = [
    readTileLimit(value.max_dynamic_patch, `${where}.max_dynamic_patch`),
    readDetail(value.detail, where),
  ].filter((limit) => limit !== undefined);
  const image = readImage(value.url, `${where}.url`);
  return imagePart(image, limits.length === 0 ? undefined : Math.min(...limits));
}

function readDetail(value: unknown, where: string): number | undefined {
  if (value === undefined || value === 'auto') return undefined;
  const tiles = typeof value === 'string' ? DETAIL_TILES.get(value) : undefined;
  if (tiles === undefined) {
    throw invalidPrompt(
      `${where}.detail is ${describe(value)}; expected 'auto', 'low', 'medium' or 'high'`,
    );
  }
  return tiles;
}

function readTileLimit(value: unknown, where: string): number | undefined {
  if (value === undefined) return undefined;
  if (typeof value !== 'number' || !Number.isInteger(value) || value < 1) {
    throw invalidPrompt(
      `${where} is ${describe(value)}; expected a whole number of tiles, at least 1`,
    );
  }
  return value;
}

function imagePart(image: ImageSource, maxDynamicPatch: number | undefined): ImagePart {
  return maxDynamicPatch === undefined
    ? { type: 'image', image }
    : { type: 'image', image, maxDynamicPatch };
}

/** A picture's source, looked at from outside. @throws TurbomindError ERR_TM_INVALID_PROMPT */
export function readImage(value: unknown, where: string): ImageSource {
  if (typeof value === 'string' && value.trim() !== '') return value;
  if (value instanceof URL || value instanceof Uint8Array) return value;
  if (isSharpLike(value) || isRawImage(value)) return value;
  throw invalidPrompt(
    `${where} is ${describe(value)}; expected a path, a URL, image bytes (Uint8Array), a sharp ` +
      'instance or raw pixels { data, width, height, channels }',
  );
}

/** True for a sharp instance: an object with `metadata` and `toBuffer` functions. */
export function isSharpLike(value: unknown): value is SharpLike {
  // Sharp instances are duplex streams: objects, never functions.
  if (typeof value !== 'object' || value === null) return false;
  return (
    'metadata' in value &&
    typeof value.metadata === 'function' &&
    'toBuffer' in value &&
    typeof value.toBuffer === 'function'
  );
}

/** True for `{ data, width, height, channels }`; sizes are lib/image.ts's to check. */
function isRawImage(value: unknown): value is RawImage {
  return (
    isJsonObject(value) &&
    value.data instanceof Uint8Array &&
    typeof value.width === 'number' &&
    typeof value.height === 'number' &&
    (value.channels === 1 || value.channels === 3 || value.channels === 4)
  );
}
