// What the two InternVL layouts share: the InternViT tower and its projector in canonical names,
// and the checks of preprocessor_config.json. Names in the files are each layout's own.

import type { VisionSpec } from '../../native-types.js';
import { type ConfigReader, LIMITS } from '../config.js';
import { tensor, type WeightRule } from './family.js';

/** PyTorch's LayerNorm default: both layouts build the projector's norm without naming an eps. */
export const PROJECTOR_NORM_EPS = 1e-5;

/** ImageNet statistics: constants of InternVL's own code, used where no file states others. */
const IMAGENET_MEAN = [0.485, 0.456, 0.406] as const;
const IMAGENET_STD = [0.229, 0.224, 0.225] as const;

/** Names of one layer's parts, relative to the layer, without `.weight` where they are linear. */
export interface VisionLayerNames {
  readonly norm1: string;
  readonly norm2: string;
  readonly proj: string;
  readonly qNorm: string;
  readonly kNorm: string;
  readonly fc1: string;
  readonly fc2: string;
  readonly scale1: string;
  readonly scale2: string;
}

/** A layout's names. */
export interface VisionNames {
  readonly cls: string;
  readonly positions: string;
  readonly patch: string;
  /** Name of layer i. */
  layer(index: number): string;
  readonly parts: VisionLayerNames;
  /** q, k and v of the layer called `layer`, from three linears or one fused one. */
  qkv(spec: VisionSpec, name: string, layer: string): WeightRule[];
  readonly projectorNorm: string;
  readonly projectorFc1: string;
  readonly projectorFc2: string;
}

/** The weights of tower and projector. */
export function visionWeights(spec: VisionSpec, hidden: number, names: VisionNames): WeightRule[] {
  const { hiddenSize: channels, patchSize: patch } = spec;
  const positions = (spec.imageSize / patch) ** 2 + 1;
  const shuffled = channels * spec.shuffleFactor ** 2;
  const rules: WeightRule[] = [
    tensor('vision.cls', names.cls, [1, 1, channels]),
    tensor('vision.positions', names.positions, [1, positions, channels]),
    tensor('vision.patch.weight', `${names.patch}.weight`, [channels, 3, patch, patch]),
    tensor('vision.patch.bias', `${names.patch}.bias`, [channels]),
  ];
  for (let index = 0; index < spec.numLayers; index += 1) {
    rules.push(...layerWeights(spec, `vision.layers.${index}`, names.layer(index), names));
  }
  rules.push(
    tensor('projector.norm.weight', `${names.projectorNorm}.weight`, [shuffled]),
    tensor('projector.norm.bias', `${names.projectorNorm}.bias`, [shuffled]),
    linear('projector.fc1', names.projectorFc1, hidden, shuffled),
    linear('projector.fc2', names.projectorFc2, hidden, hidden),
  );
  return rules;
}

function layerWeights(
  spec: VisionSpec,
  name: string,
  layer: string,
  names: VisionNames,
): WeightRule[] {
  const { hiddenSize: channels, intermediateSize: inner } = spec;
  const { parts } = names;
  const norm = (to: string, from: string): WeightRule[] => [
    tensor(`${name}.${to}.weight`, `${layer}.${from}.weight`, [channels]),
    ...(spec.rmsNorm ? [] : [tensor(`${name}.${to}.bias`, `${layer}.${from}.bias`, [channels])]),
  ];
  const headNorms = spec.qkNorm
    ? [
        tensor(`${name}.attn.q_norm.weight`, `${layer}.${parts.qNorm}.weight`, [channels]),
        tensor(`${name}.attn.k_norm.weight`, `${layer}.${parts.kNorm}.weight`, [channels]),
      ]
    : [];
  return [
    ...norm('norm1', parts.norm1),
    ...names.qkv(spec, name, layer),
    ...headNorms,
    linear(`${name}.attn.proj`, `${layer}.${parts.proj}`, channels, channels),
    tensor(`${name}.scale1`, `${layer}.${parts.scale1}`, [channels]),
    ...norm('norm2', parts.norm2),
    linear(`${name}.mlp.fc1`, `${layer}.${parts.fc1}`, inner, channels),
    linear(`${name}.mlp.fc2`, `${layer}.${parts.fc2}`, channels, inner),
    tensor(`${name}.scale2`, `${layer}.${parts.scale2}`, [channels]),
  ];
}

function linear(name: string, source: string, n: number, k: number): WeightRule {
  return { type: 'linear', name, source, n, k, hasBias: true };
}

/** Layers to run for a choice of hidden state: -1 is the last layer's output, -2 the one before. */
export function layersToRun(config: ConfigReader, key: string, numLayers: number): number {
  const choice = config.optionalInteger(key, { min: -numLayers, max: numLayers }) ?? -1;
  const layers = choice < 0 ? numLayers + 1 + choice : choice;
  if (layers < 1) throw config.invalid(key, choice, `a layer from 1 to ${numLayers}`);
  return layers;
}

/** 1 / downsample_ratio, which must be whole and divide the patch grid. */
export function readShuffleFactor(config: ConfigReader, grid: number): number {
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
export function readGrid(vision: ConfigReader, imageSize: number, patchSize: number): number {
  if (imageSize % patchSize !== 0) {
    throw vision.invalid('patch_size', patchSize, `a divisor of the tile's ${imageSize} pixels`);
  }
  return imageSize / patchSize;
}

/** True for RMSNorm. */
export function readNormType(vision: ConfigReader): boolean {
  vision.requireOneOf('norm_type', ['layer_norm', 'rms_norm']);
  return vision.string('norm_type', 'layer_norm') === 'rms_norm';
}

/** Head count, refused unless it divides the hidden size. */
export function readVisionHeads(vision: ConfigReader, hiddenSize: number): number {
  const heads = vision.integer('num_attention_heads', LIMITS.heads);
  if (hiddenSize % heads !== 0) {
    throw vision.invalid('num_attention_heads', heads, `a divisor of hidden_size ${hiddenSize}`);
  }
  return heads;
}

/** Mean and standard deviation a channel; refuses preprocessing other than native code's. */
export function readNormalization(
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
