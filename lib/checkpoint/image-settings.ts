// How pictures become tiles and image tokens: the tower's geometry, the limits of the
// preprocessor, and the ids of the image tokens, found by their strings.

import { join } from 'node:path';
import { TurbomindError } from '../errors.js';
import { ConfigReader } from './config.js';
import type { VisionPart } from './families/family.js';
import { isJsonObject, type JsonObject, jsonGet, readOptionalJsonFile } from './json.js';

/** How pictures become tiles and tokens; absent for text models. */
export interface ImageSettings {
  /** Side of a tile in pixels. */
  readonly tileSize: number;
  readonly tokensPerTile: number;
  /** Fewest and most tiles of an image, thumbnail not counted. */
  readonly minDynamicPatch: number;
  readonly maxDynamicPatch: number;
  readonly useThumbnail: boolean;
  /** '<img>' */
  readonly startToken: string;
  /** '</img>' */
  readonly endToken: string;
  /** '<IMG_CONTEXT>': the prompt token that an image embedding replaces. */
  readonly contextToken: string;
}

/** Resolves the image tokens by their strings; config.json's id must agree. */
export async function readImageSettings(
  root: string,
  config: ConfigReader,
  vision: VisionPart,
  tokenizerConfig: JsonObject,
): Promise<{ image: ImageSettings; imageTokenId: number }> {
  const reader = new ConfigReader(tokenizerConfig, 'tokenizer_config.json');
  const contextToken = reader.string('context_image_token', '<IMG_CONTEXT>');
  const found = await findTokenId(root, tokenizerConfig, contextToken);
  const imageTokenId = found ?? vision.imageTokenId;
  if (imageTokenId === undefined) {
    throw new TurbomindError(
      'ERR_TM_INVALID_TOKENIZER',
      `no tokenizer file defines the image token ${contextToken} (${root})`,
    );
  }
  if (vision.imageTokenId !== undefined && vision.imageTokenId !== imageTokenId) {
    throw config.invalid(
      'image_token_id',
      vision.imageTokenId,
      `${imageTokenId} (${contextToken})`,
    );
  }
  const { imageSize, patchSize, shuffleFactor } = vision.spec;
  if (vision.tiling.minDynamicPatch > vision.tiling.maxDynamicPatch) {
    throw config.invalid('min_dynamic_patch', vision.tiling.minDynamicPatch, 'at most the maximum');
  }
  return {
    imageTokenId,
    image: {
      tileSize: imageSize,
      tokensPerTile: (imageSize / patchSize / shuffleFactor) ** 2,
      ...vision.tiling,
      startToken: reader.string('start_image_token', '<img>'),
      endToken: reader.string('end_image_token', '</img>'),
      contextToken,
    },
  };
}

/** Looks in the small files first: parsing a large tokenizer.json takes a quarter of a second. */
async function findTokenId(
  root: string,
  tokenizerConfig: JsonObject,
  token: string,
): Promise<number | undefined> {
  const decoder = jsonGet(tokenizerConfig, 'added_tokens_decoder');
  for (const [id, entry] of Object.entries(isJsonObject(decoder) ? decoder : {})) {
    if (isJsonObject(entry) && entry.content === token) return requireId(Number(id), token);
  }
  const added = await readOptionalJsonFile(join(root, 'added_tokens.json'), CODE);
  const listed = added === undefined ? undefined : jsonGet(added, token);
  if (listed !== undefined) return requireId(listed, token);
  const tokenizer = await readOptionalJsonFile(join(root, 'tokenizer.json'), CODE);
  const tokens = tokenizer === undefined ? [] : jsonGet(tokenizer, 'added_tokens');
  const entry: unknown = Array.isArray(tokens)
    ? tokens.find((candidate) => isJsonObject(candidate) && candidate.content === token)
    : undefined;
  return isJsonObject(entry) ? requireId(entry.id, token) : undefined;
}

function requireId(id: unknown, token: string): number {
  if (typeof id === 'number' && Number.isInteger(id) && id >= 0) return id;
  throw new TurbomindError(CODE, `the tokenizer files give ${token} the id ${JSON.stringify(id)}`);
}

const CODE = 'ERR_TM_INVALID_TOKENIZER';
