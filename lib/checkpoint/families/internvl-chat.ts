// InternVLChatModel: the layout of OpenGVLab's own `internvl_chat` code. q, k and v of the vision
// tower are one fused tensor, which we split by rows without copying.

import type { DecoderSpec, VisionSpec } from '../../native-types.js';
import { type ConfigReader, LIMITS } from '../config.js';
import { decoderWeights, readTiedEmbeddings } from './decoder.js';
import { findDecoderFamily } from './decoders.js';
import type { FamilyInput, FamilyModel, ModelFamily, TensorRule, VisionPart } from './family.js';
import { readTower } from './tower.js';
import { type VisionNames, visionWeights } from './vision.js';

const HEAD = 'language_model.lm_head';

export const internvlChat: ModelFamily = {
  architectures: ['InternVLChatModel'],
  read: (input) => {
    const { config } = input;
    const llm = config.object('llm_config');
    const vision = readVision(input);
    const decoder: DecoderSpec = {
      ...findDecoderFamily(llm).readDecoder(llm),
      // This code base always stores a head and never ties it, whatever the flags say.
      tiedEmbeddings: !input.hasTensor(`${HEAD}.weight`) && isTied(input, config, llm),
    };
    const templateName = config.optionalString('template');
    return {
      decoder,
      vision,
      weights: [
        ...decoderWeights(decoder, 'language_model.model.', HEAD),
        ...visionWeights(vision.spec, decoder.hiddenSize, NAMES),
      ],
      configs: [config, llm],
      ...(templateName === undefined ? {} : { templateName }),
    } satisfies FamilyModel;
  },
};

function isTied(input: FamilyInput, config: ConfigReader, llm: ConfigReader): boolean {
  return readTiedEmbeddings(input, [config, llm], HEAD);
}

function readVision(input: FamilyInput): VisionPart {
  const { config } = input;
  const vision = config.object('vision_config');
  refuseOtherTowers(config, vision);
  const imageSize = readTileSize(config, vision);
  const spec = readTower(input, vision, imageSize, {
    layer: 'select_layer',
    qkvBias: 'qkv_bias',
    qkNorm: 'qk_normalization',
  });
  return { spec, tiling: readTiling(config) };
}

function refuseOtherTowers(config: ConfigReader, vision: ConfigReader): void {
  vision.requireOneOf('hidden_act', ['gelu']);
  vision.requireOneOf('num_channels', [3]);
  config.requireOneOf('pad2square', [false]);
  config.requireOneOf('use_backbone_lora', [0]);
  config.requireOneOf('use_llm_lora', [0]);
  // Version 1 (InternVL-Chat-V1-1 and 1-2) transposes the order of the tokens; it was the default.
  if (config.raw('ps_version') !== 'v2') {
    throw config.unsupported('ps_version', config.raw('ps_version'), '"v2"');
  }
}

/** A tower forced to another tile size would need its positions interpolated. */
function readTileSize(config: ConfigReader, vision: ConfigReader): number {
  const own = vision.squareSide('image_size', LIMITS.pixels);
  const forced = config.optionalInteger('force_image_size', LIMITS.pixels) ?? own;
  if (forced !== own) {
    throw config.unsupported('force_image_size', forced, `the tower's image_size ${own}`);
  }
  return own;
}

function readTiling(config: ConfigReader): VisionPart['tiling'] {
  const minDynamicPatch = config.optionalInteger('min_dynamic_patch', LIMITS.tiles) ?? 1;
  const maxDynamicPatch = config.optionalInteger('max_dynamic_patch', LIMITS.tiles) ?? 12;
  const useThumbnail = config.boolean('use_thumbnail', false);
  // Without dynamic sizes every image is one tile.
  return config.boolean('dynamic_image_size', true)
    ? { minDynamicPatch, maxDynamicPatch, useThumbnail }
    : { minDynamicPatch: 1, maxDynamicPatch: 1, useThumbnail: false };
}

const NAMES: VisionNames = {
  cls: 'vision_model.embeddings.class_embedding',
  positions: 'vision_model.embeddings.position_embedding',
  patch: 'vision_model.embeddings.patch_embedding',
  layer: (index) => `vision_model.encoder.layers.${index}`,
  parts: {
    norm1: 'norm1',
    norm2: 'norm2',
    proj: 'attn.proj',
    qNorm: 'attn.q_norm',
    kNorm: 'attn.k_norm',
    scale1: 'ls1',
    scale2: 'ls2',
  },
  qkv: splitQkv,
  projectorNorm: 'mlp1.0',
  projectorFc1: 'mlp1.1',
  projectorFc2: 'mlp1.3',
};

/** Rows 0..C of `attn.qkv` are q, C..2C k, 2C..3C v. */
function splitQkv(spec: VisionSpec, name: string, layer: string): TensorRule[] {
  const channels = spec.hiddenSize;
  return ['q', 'k', 'v'].flatMap((part, index) => {
    const rows = { first: index * channels, total: 3 * channels };
    const rule = (suffix: string, shape: number[]): TensorRule => ({
      type: 'tensor',
      name: `${name}.attn.${part}.${suffix}`,
      source: `${layer}.attn.qkv.${suffix}`,
      shape,
      rows,
    });
    const weight = rule('weight', [channels, channels]);
    return spec.qkvBias ? [weight, rule('bias', [channels])] : [weight];
  });
}
