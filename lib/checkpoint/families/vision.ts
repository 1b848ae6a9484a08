// What the two InternVL layouts share: the weights of the InternViT tower and its projector in
// canonical names. Names in the files are each layout's own; sizes are tower.ts's.

import type { VisionSpec } from '../../native-types.js';
import { tensor, type WeightRule } from './family.js';

/** Names of one layer's parts, relative to the layer, without `.weight` where they are linear. */
export interface VisionLayerNames {
  readonly norm1: string;
  readonly norm2: string;
  readonly proj: string;
  readonly qNorm: string;
  readonly kNorm: string;
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
    linear(`${name}.mlp.fc1`, `${layer}.mlp.fc1`, inner, channels),
    linear(`${name}.mlp.fc2`, `${layer}.mlp.fc2`, channels, inner),
    tensor(`${name}.scale2`, `${layer}.${parts.scale2}`, [channels]),
  ];
}

function linear(name: string, source: string, n: number, k: number): WeightRule {
  return { type: 'linear', name, source, n, k, hasBias: true };
}
