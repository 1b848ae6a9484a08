// InternVLForConditionalGeneration: the layout of transformers (`*-hf` checkpoints). Files written
// before transformers 4.52 lack the outer `model.` in their names.

import type { DecoderSpec, VisionSpec } from '../../native-types.js';
import { type ConfigReader, LIMITS } from '../config.js';
import { decoderWeights, readTiedEmbeddings } from './decoder.js';
import { findDecoderFamily } from './decoders.js';
import {
  type FamilyInput,
  type FamilyModel,
  findPrefix,
  type ModelFamily,
  type VisionPart,
} from './family.js';
import { readTower } from './tower.js';
import { type VisionNames, visionWeights } from './vision.js';

export const internvlHf: ModelFamily = {
  architectures: ['InternVLForConditionalGeneration'],
  read: (input) => {
    const { config } = input;
    const text = config.object('text_config');
    const vision = readVision(input);
    const decoderPrefix = findPrefix(
      input,
      ['model.language_model.', 'language_model.model.'],
      'embed_tokens.weight',
    );
    const head = decoderPrefix.startsWith('model.') ? 'lm_head' : 'language_model.lm_head';
    const decoder: DecoderSpec = {
      ...findDecoderFamily(text).readDecoder(text),
      tiedEmbeddings: readTiedEmbeddings(input, [config, text], head),
    };
    return {
      decoder,
      vision,
      weights: [
        ...decoderWeights(decoder, decoderPrefix, head),
        ...visionWeights(vision.spec, decoder.hiddenSize, visionNames(input)),
      ],
      configs: [config, text],
    } satisfies FamilyModel;
  },
};

function readVision(input: FamilyInput): VisionPart {
  const { config, preprocessor } = input;
  const vision = config.object('vision_config');
  refuseOtherTowers(config, vision);
  const imageSize = vision.squareSide('image_size', LIMITS.pixels);
  const spec = readTower(input, vision, imageSize, {
    layer: 'vision_feature_layer',
    qkvBias: 'attention_bias',
    qkNorm: 'use_qk_norm',
  });
  refuseOtherTokenCount(config, spec);
  const imageTokenId =
    config.optionalInteger('image_token_id', LIMITS.tokenId) ??
    config.optionalInteger('image_token_index', LIMITS.tokenId);
  return {
    spec,
    tiling: {
      minDynamicPatch: preprocessor?.optionalInteger('min_patches', LIMITS.tiles) ?? 1,
      maxDynamicPatch: preprocessor?.optionalInteger('max_patches', LIMITS.tiles) ?? 12,
      // The processor of this layout always adds one.
      useThumbnail: preprocessor?.boolean('use_thumbnail', true) ?? true,
    },
    ...(imageTokenId === undefined ? {} : { imageTokenId }),
  };
}

function refuseOtherTowers(config: ConfigReader, vision: ConfigReader): void {
  vision.requireOneOf('hidden_act', ['gelu']);
  vision.requireOneOf('num_channels', [3]);
  vision.requireOneOf('use_absolute_position_embeddings', [true]);
  // false would add a norm behind the last layer.
  vision.requireOneOf('use_mean_pooling', [true]);
  config.requireOneOf('projector_hidden_act', ['gelu']);
  config.requireOneOf('vision_feature_select_strategy', ['default']);
}

function refuseOtherTokenCount(config: ConfigReader, spec: VisionSpec): void {
  const expected = (spec.imageSize / spec.patchSize / spec.shuffleFactor) ** 2;
  const stated = config.optionalInteger('image_seq_length', LIMITS.positions);
  if (stated !== undefined && stated !== expected) {
    throw config.invalid('image_seq_length', stated, `${expected}, by tile, patch and ratio`);
  }
}

function visionNames(input: FamilyInput): VisionNames {
  const tower = findPrefix(input, ['model.vision_tower.', 'vision_tower.'], 'embeddings.cls_token');
  const projector = findPrefix(
    input,
    ['model.multi_modal_projector.', 'multi_modal_projector.'],
    'linear_1.weight',
  );
  return {
    cls: `${tower}embeddings.cls_token`,
    positions: `${tower}embeddings.position_embeddings`,
    patch: `${tower}embeddings.patch_embeddings.projection`,
    layer: (index) => `${tower}encoder.layer.${index}`,
    parts: {
      norm1: 'layernorm_before',
      norm2: 'layernorm_after',
      proj: 'attention.projection_layer',
      qNorm: 'attention.q_norm',
      kNorm: 'attention.k_norm',
      scale1: 'lambda_1',
      scale2: 'lambda_2',
    },
    qkv: (spec, name, layer) =>
      ['q', 'k', 'v'].map((part) => ({
        type: 'linear',
        name: `${name}.attn.${part}`,
        source: `${layer}.attention.${part}_proj`,
        n: spec.hiddenSize,
        k: spec.hiddenSize,
        hasBias: spec.qkvBias,
      })),
    projectorNorm: `${projector}layer_norm`,
    projectorFc1: `${projector}linear_1`,
    projectorFc2: `${projector}linear_2`,
  };
}
