// The decoder block that native code runs (pre-norm, GQA, RoPE, SwiGLU), read from the config
// fields that Llama-like families share. Anything that block cannot express is refused by name.

import type { DecoderSpec } from '../../native-types.js';
import { type ConfigReader, LIMITS } from '../config.js';
import type { FamilyInput, LinearRule, TensorRule, WeightRule } from './family.js';
import { tensor } from './family.js';

/** What differs between Llama-like families. */
export interface DecoderTraits {
  readonly qkvBias: boolean;
  readonly qkNorm: boolean;
}

/** Reads the shared fields; refuses rope types, windows, biases and activations we do not have. */
export function readSharedDecoder(
  config: ConfigReader,
  traits: DecoderTraits,
): Omit<DecoderSpec, 'tiedEmbeddings'> {
  refuseOtherBlocks(config);
  // true would also put a bias on the output projection.
  if (!traits.qkvBias) config.requireOneOf('attention_bias', [false]);
  const hiddenSize = config.integer('hidden_size', LIMITS.hidden);
  const numHeads = config.integer('num_attention_heads', LIMITS.heads);
  const numKvHeads = config.optionalInteger('num_key_value_heads', LIMITS.heads) ?? numHeads;
  if (numHeads % numKvHeads !== 0) {
    throw config.invalid('num_key_value_heads', numKvHeads, `a divisor of ${numHeads} heads`);
  }
  return {
    hiddenSize,
    numLayers: config.integer('num_hidden_layers', LIMITS.layers),
    numHeads,
    numKvHeads,
    headDim: readHeadDim(config, hiddenSize, numHeads),
    intermediateSize: config.integer('intermediate_size', LIMITS.intermediate),
    vocabSize: config.integer('vocab_size', LIMITS.vocab),
    maxPositionEmbeddings: config.integer('max_position_embeddings', LIMITS.positions),
    normEps: config.number('rms_norm_eps', LIMITS.epsilon),
    ropeTheta: readRopeTheta(config),
    qkvBias: traits.qkvBias,
    qkNorm: traits.qkNorm,
  };
}

function readHeadDim(config: ConfigReader, hiddenSize: number, numHeads: number): number {
  const given = config.optionalInteger('head_dim', LIMITS.headDim);
  if (given === undefined && hiddenSize % numHeads !== 0) {
    throw config.invalid('num_attention_heads', numHeads, `a divisor of hidden_size ${hiddenSize}`);
  }
  const headDim = given ?? hiddenSize / numHeads;
  if (headDim % 2 !== 0) throw config.invalid('head_dim', headDim, 'an even number, for RoPE');
  return headDim;
}

function refuseOtherBlocks(config: ConfigReader): void {
  config.requireOneOf('hidden_act', ['silu']);
  config.requireOneOf('mlp_bias', [false]);
  config.requireOneOf('partial_rotary_factor', [1]);
  config.requireOneOf('pretraining_tp', [1]);
  refuseSlidingWindow(config);
}

/** A window that no position can reach, or that no layer uses, is no window. */
function refuseSlidingWindow(config: ConfigReader): void {
  const layerTypes = config.strings('layer_types');
  const other = layerTypes.find((type) => type !== 'full_attention');
  if (other !== undefined) throw config.unsupported('layer_types', other, '"full_attention" only');
  if (layerTypes.length > 0) return;
  const window = config.raw('sliding_window');
  if (window === undefined || !config.boolean('use_sliding_window', false)) return;
  const layers = config.integer('num_hidden_layers', LIMITS.layers);
  const firstWindowed = config.optionalInteger('max_window_layers', { min: 0, max: 1024 }) ?? 0;
  const positions = config.integer('max_position_embeddings', LIMITS.positions);
  const size = config.integer('sliding_window', LIMITS.positions);
  if (size < positions && firstWindowed < layers) {
    throw config.unsupported('sliding_window', window, 'full attention (use_sliding_window false)');
  }
}

const ROPE_TYPES = ['default', 'dynamic'];

/**
 * Base of the rotary frequencies. transformers 5 writes `rope_parameters`, older ones `rope_theta`
 * and `rope_scaling`. 'dynamic' scales only beyond max_position_embeddings, where no sequence of
 * ours goes, so up to there it is 'default' (InternVL3 ships it).
 */
function readRopeTheta(config: ConfigReader): number {
  const fallback = config.optionalNumber('rope_theta', LIMITS.theta) ?? 10_000;
  let theta = fallback;
  for (const key of ['rope_scaling', 'rope_parameters']) {
    const rope = config.optionalObject(key);
    if (rope === undefined) continue;
    const type = rope.optionalString('rope_type') ?? rope.string('type', 'default');
    if (!ROPE_TYPES.includes(type)) {
      throw rope.unsupported('rope_type', type, '"default", and "dynamic" within its range');
    }
    for (const nested of ['full_attention', 'sliding_attention', 'mrope_section']) {
      if (rope.has(nested)) {
        throw rope.unsupported(nested, rope.raw(nested), 'one "default" rope for all layers');
      }
    }
    rope.requireOneOf('partial_rotary_factor', [1]);
    theta = rope.optionalNumber('rope_theta', LIMITS.theta) ?? theta;
  }
  return theta;
}

/**
 * The weights of a decoder.
 *
 * @param prefix what stands before `embed_tokens.weight`.
 * @param head name of the head's tensor without `.weight`.
 */
export function decoderWeights(spec: DecoderSpec, prefix: string, head: string): WeightRule[] {
  const { hiddenSize: hidden, vocabSize: vocab } = spec;
  const rules: WeightRule[] = [
    tensor('embed_tokens.weight', `${prefix}embed_tokens.weight`, [vocab, hidden]),
  ];
  for (let layer = 0; layer < spec.numLayers; layer += 1) {
    rules.push(...layerWeights(spec, `layers.${layer}`, `${prefix}layers.${layer}`));
  }
  rules.push(tensor('norm.weight', `${prefix}norm.weight`, [hidden]));
  if (!spec.tiedEmbeddings) {
    rules.push(tensor('lm_head.weight', `${head}.weight`, [vocab, hidden]));
  }
  return rules;
}

function layerWeights(spec: DecoderSpec, name: string, source: string): WeightRule[] {
  const { hiddenSize: hidden, intermediateSize: inner, headDim } = spec;
  const queries = spec.numHeads * headDim;
  const keys = spec.numKvHeads * headDim;
  const attention = `${source}.self_attn`;
  const linear = (to: string, from: string, n: number, k: number, hasBias = false): LinearRule => ({
    type: 'linear',
    name: `${name}.${to}`,
    source: `${source}.${from}`,
    n,
    k,
    hasBias,
  });
  const headNorms: TensorRule[] = spec.qkNorm
    ? ['q_norm', 'k_norm'].map((norm) =>
        tensor(`${name}.attn.${norm}.weight`, `${attention}.${norm}.weight`, [headDim]),
      )
    : [];
  return [
    tensor(`${name}.input_norm.weight`, `${source}.input_layernorm.weight`, [hidden]),
    linear('attn.q', 'self_attn.q_proj', queries, hidden, spec.qkvBias),
    linear('attn.k', 'self_attn.k_proj', keys, hidden, spec.qkvBias),
    linear('attn.v', 'self_attn.v_proj', keys, hidden, spec.qkvBias),
    linear('attn.o', 'self_attn.o_proj', hidden, queries),
    ...headNorms,
    tensor(`${name}.post_attention_norm.weight`, `${source}.post_attention_layernorm.weight`, [
      hidden,
    ]),
    linear('mlp.gate', 'mlp.gate_proj', inner, hidden),
    linear('mlp.up', 'mlp.up_proj', inner, hidden),
    linear('mlp.down', 'mlp.down_proj', hidden, inner),
  ];
}

/**
 * Whether the head is the embedding table. Configs around a decoder repeat the flag; where they
 * disagree or say nothing, the files decide.
 */
export function readTiedEmbeddings(
  input: FamilyInput,
  configs: readonly ConfigReader[],
  head: string,
): boolean {
  const flags = configs.flatMap((config) => config.optionalBoolean('tie_word_embeddings') ?? []);
  const [first] = flags;
  if (first !== undefined && flags.every((flag) => flag === first)) return first;
  return !input.hasTensor(`${head}.weight`);
}
