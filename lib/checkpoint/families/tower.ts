// What the two InternVL layouts share: reading the InternViT tower's sizes from config.json and
// preprocessor_config.json, and refusing what native code does not run. Some keys are named by each
// layout. Weights are vision.ts's.

import type { VisionSpec } from '../../native-types.js';
import { type ConfigReader, LIMITS } from '../config.js';
import type { FamilyInput } from './family.js';

/** PyTorch's LayerNorm default: both layouts build the projector's norm without naming an eps. */
const PROJECTOR_NORM_EPS = 1e-5;

/** ImageNet statistics: constants of InternVL's own code, used where no file states others. */
const IMAGENET_MEAN = [0.485, 0.456, 0.406] as const;
const IMAGENET_STD = [0.229, 0.224, 0.225] as const;

/** Keys that the layouts call differently. */
export interface TowerKeys {
  /** Which hidden state is used; of the model's config. */
  readonly layer: string;
  readonly qkvBias: string;
  readonly qkNorm: string;
}

/** The tower of `vision`, for tiles of `imageSize` pixels. */
export function readTower(
  { config, preprocessor }: FamilyInput,
  vision: ConfigReader,
  imageSize: number,
  keys: TowerKeys,
): VisionSpec {
  const patchSize = vision.squareSide('patch_size', LIMITS.pixels);
  const grid = readGrid(vision, imageSize, patchSize);
  const hiddenSize = vision.integer('hidden_size', LIMITS.hidden);
  const numLayers = vision.integer('num_hidden_layers', LIMITS.layers);
  return {
    imageSize,
    patchSize,
    hiddenSize,
    numLayers: layersToRun(config, keys.layer, numLayers),
    numHeads: readVisionHeads(vision, hiddenSize),
    intermediateSize: vision.integer('intermediate_size', LIMITS.intermediate),
    normEps: vision.number('layer_norm_eps', LIMITS.epsilon),
    rmsNorm: readNormType(vision),
    qkvBias: vision.boolean(keys.qkvBias, false),
    qkNorm: vision.boolean(keys.qkNorm, false),
    shuffleFactor: readShuffleFactor(config, grid),
    projectorNormEps: PROJECTOR_NORM_EPS,
    ...readNormalization(preprocessor, imageSize),
  };
}

/** Layers to run for a choice of hidden state: -1 is the last layer's output, -2 the one before. */
function layersToRun(config: ConfigReader, key: string, numLayers: number): number {
  const choice = config.optionalInteger(key, { min: -numLayers, max: numLayers }) ?? -1;
  const layers = choice < 0 ? numLayers + 1 + choice : choice;
  if (layers < 1) throw config.invalid(key, choice, `a layer from 1 to ${numLayers}`);
  return layers;
}

/** 1 / downsample_ratio, which must be whole and divide the patch grid. */
function readShuffleFactor(config: ConfigReader, grid: number): number {
  const ratio = config.number('downsample_ratio', { min: 0.001, max: 1 });
  const factor = Math.round(1 / ratio);
  if (Math.abs(factor * ratio - 1) > 1e-6 || grid % factor !== 0) {
    throw config.unsupported(
      'downsample_ratio',
      ratio,
      `1 / n where n divides the ${grid} patches`,
    );
  }
  return factor;
}

/** Side of the patch grid. */
function readGrid(vision: ConfigReader, imageSize: number, patchSize: number): number {
  if (imageSize % patchSize !== 0) {
    throw vision.invalid('patch_size', patchSize, `a divisor of the tile's ${imageSize} pixels`);
  }
  return imageSize / patchSize;
}

/** True for RMSNorm. */
function readNormType(vision: ConfigReader): boolean {
  vision.requireOneOf('norm_type', ['layer_norm', 'rms_norm']);
  return vision.string('norm_type', 'layer_norm') === 'rms_norm';
}

/** Head count, refused unless it divides the hidden size. */
function readVisionHeads(vision: ConfigReader, hiddenSize: number): number {
  const heads = vision.integer('num_attention_heads', LIMITS.heads);
  if (hiddenSize % heads !== 0) {
    throw vision.invalid('num_attention_heads', heads, `a divisor of hidden_size ${hiddenSize}`);
  }
  return heads;
}

/** Mean and standard deviation a channel; refuses preprocessing other than native code's. */
function readNormalization(
  preprocessor: ConfigReader | undefined,
  tileSize: number,
): Pick<VisionSpec, 'mean' | 'std'> {
  if (preprocessor === undefined) return { mean: IMAGENET_MEAN, std: IMAGENET_STD };
  preprocessor.requireOneOf('do_normalize', [true]);
  preprocessor.requireOneOf('do_rescale', [true]);
  preprocessor.requireOneOf('resample', [3]);
  const factor = preprocessor.optionalNumber('rescale_factor', { min: 0, max: 1 }) ?? 1 / 255;
  if (Math.abs(factor * 255 - 1) > 1e-6) {
    throw preprocessor.unsupported('rescale_factor', factor, '1/255');
  }
  refuseOtherSize(preprocessor, tileSize);
  return {
    mean: readChannels(preprocessor, 'image_mean', { min: -1, max: 2 }) ?? IMAGENET_MEAN,
    std: readChannels(preprocessor, 'image_std', { min: 1e-6, max: 10 }) ?? IMAGENET_STD,
  };
}

/** `size` is a number or { height, width }; other forms belong to other processors. */
function refuseOtherSize(preprocessor: ConfigReader, tileSize: number): void {
  const size = preprocessor.raw('size');
  if (size === undefined) return;
  const sides =
    typeof size === 'number'
      ? [size]
      : ['height', 'width'].flatMap((key) => preprocessor.optionalObject('size')?.raw(key) ?? []);
  const other = sides.find((side) => side !== tileSize);
  if (other !== undefined) {
    throw preprocessor.invalid('size', size, `the vision tower's ${tileSize} pixels`);
  }
}

function readChannels(
  preprocessor: ConfigReader,
  key: string,
  bounds: { min: number; max: number },
): [number, number, number] | undefined {
  const value = preprocessor.raw(key);
  if (value === undefined) return undefined;
  const isChannel = (item: unknown): item is number =>
    typeof item === 'number' && item >= bounds.min && item <= bounds.max;
  if (Array.isArray(value) && value.length === 3) {
    const [red, green, blue]: unknown[] = value;
    if (isChannel(red) && isChannel(green) && isChannel(blue)) return [red, green, blue];
  }
  throw preprocessor.invalid(key, value, `three numbers from ${bounds.min} to ${bounds.max}`);
}
