// Helpers of the checkpoint tests: model folders written by hand, weights as sparse zeros.

import { mkdtemp, open, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished } from 'vitest';
import { TurbomindError, type TurbomindErrorCode } from '../../lib/errors.js';

export interface TestTensor {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
}

const DTYPE_BYTES: Readonly<Record<string, number>> = { F32: 4, F16: 2, BF16: 2, I32: 4, I64: 8 };

/** An empty folder that is removed when the test ends. */
export async function temporaryFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'turbomind-test-'));
  onTestFinished(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

/** Header JSON of tensors that lie one behind the other. */
export function headerOf(tensors: readonly TestTensor[]): { json: string; dataBytes: number } {
  let end = 0;
  const entries = tensors.map(({ name, dtype, shape }) => {
    const begin = end;
    end += shape.reduce((product, size) => product * size, DTYPE_BYTES[dtype] ?? 1);
    return [name, { dtype, shape, data_offsets: [begin, end] }] as const;
  });
  return { json: JSON.stringify(Object.fromEntries(entries)), dataBytes: end };
}

/** Writes a file with any header and `dataBytes` zeros behind it. */
export async function writeRawSafetensors(
  path: string,
  header: string | Uint8Array,
  dataBytes: number,
  headerBytes?: bigint,
): Promise<void> {
  const bytes = Buffer.from(header);
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(headerBytes ?? BigInt(bytes.length));
  const file = await open(path, 'w');
  await file.write(Buffer.concat([prefix, bytes]));
  await file.truncate(8 + bytes.length + dataBytes);
  await file.close();
}

export async function writeSafetensors(
  path: string,
  tensors: readonly TestTensor[],
): Promise<void> {
  const { json, dataBytes } = headerOf(tensors);
  await writeRawSafetensors(path, json, dataBytes);
}

export type Json = Record<string, unknown>;

/** Writes config.json, one model.safetensors and any other files, objects as JSON. */
export async function writeModelFolder(
  config: Json,
  tensors: readonly TestTensor[],
  files: Readonly<Record<string, Json | string>> = {},
): Promise<string> {
  const folder = await temporaryFolder();
  for (const [name, content] of Object.entries({ 'config.json': config, ...files })) {
    const text = typeof content === 'string' ? content : JSON.stringify(content);
    await writeFile(join(folder, name), text);
  }
  await writeSafetensors(join(folder, 'model.safetensors'), tensors);
  return folder;
}

/** A text config of two layers, hidden 64, four heads of 16 on two KV heads. */
export function textConfig(fields: Json = {}): Json {
  return {
    architectures: ['Qwen2ForCausalLM'],
    model_type: 'qwen2',
    hidden_act: 'silu',
    hidden_size: 64,
    intermediate_size: 128,
    max_position_embeddings: 512,
    num_attention_heads: 4,
    num_hidden_layers: 2,
    num_key_value_heads: 2,
    rms_norm_eps: 1e-6,
    rope_theta: 10000,
    tie_word_embeddings: false,
    vocab_size: 320,
    eos_token_id: 258,
    ...fields,
  };
}

export interface DecoderLayout {
  readonly prefix?: string;
  readonly head?: string | undefined;
  readonly qkvBias?: boolean;
  readonly qkNorm?: boolean;
  /** Quantise the linears of the layers: AWQ, this group size. */
  readonly groupSize?: number;
  readonly dtype?: string;
}

/** The tensors that belong to `textConfig()`, spelled out here and not taken from the code. */
export function decoderTensors(layout: DecoderLayout = {}): TestTensor[] {
  const { prefix = 'model.', qkvBias = true, qkNorm = false, groupSize, dtype = 'BF16' } = layout;
  const head = 'head' in layout ? layout.head : 'lm_head';
  const tensor = (name: string, ...shape: number[]): TestTensor => ({ name, dtype, shape });
  const linear = (name: string, n: number, k: number): TestTensor[] =>
    groupSize === undefined
      ? [tensor(`${name}.weight`, n, k)]
      : [
          { name: `${name}.qweight`, dtype: 'I32', shape: [k, n / 8] },
          { name: `${name}.qzeros`, dtype: 'I32', shape: [k / groupSize, n / 8] },
          { name: `${name}.scales`, dtype: 'F16', shape: [k / groupSize, n] },
        ];
  const layers = [0, 1].flatMap((index) => {
    const layer = `${prefix}layers.${index}`;
    return [
      tensor(`${layer}.input_layernorm.weight`, 64),
      tensor(`${layer}.post_attention_layernorm.weight`, 64),
      ...linear(`${layer}.self_attn.q_proj`, 64, 64),
      ...linear(`${layer}.self_attn.k_proj`, 32, 64),
      ...linear(`${layer}.self_attn.v_proj`, 32, 64),
      ...linear(`${layer}.self_attn.o_proj`, 64, 64),
      ...linear(`${layer}.mlp.gate_proj`, 128, 64),
      ...linear(`${layer}.mlp.up_proj`, 128, 64),
      ...linear(`${layer}.mlp.down_proj`, 64, 128),
      ...(qkvBias
        ? [
            tensor(`${layer}.self_attn.q_proj.bias`, 64),
            tensor(`${layer}.self_attn.k_proj.bias`, 32),
            tensor(`${layer}.self_attn.v_proj.bias`, 32),
          ]
        : []),
      ...(qkNorm
        ? [
            tensor(`${layer}.self_attn.q_norm.weight`, 16),
            tensor(`${layer}.self_attn.k_norm.weight`, 16),
          ]
        : []),
    ];
  });
  return [
    tensor(`${prefix}embed_tokens.weight`, 320, 64),
    ...layers,
    tensor(`${prefix}norm.weight`, 64),
    ...(head === undefined ? [] : [tensor(`${head}.weight`, 320, 64)]),
  ];
}

/** A vision tower of one layer, hidden 32, tiles of 32 px, patches of 8: 16 patches, 4 tokens. */
export function hfVisionTensors(prefix = ''): TestTensor[] {
  const tensor = (name: string, ...shape: number[]): TestTensor => ({
    name: `${prefix}${name}`,
    dtype: 'BF16',
    shape,
  });
  const layer = 'vision_tower.encoder.layer.0';
  const linear = (name: string, n: number, k: number): TestTensor[] => [
    tensor(`${name}.weight`, n, k),
    tensor(`${name}.bias`, n),
  ];
  return [
    tensor('vision_tower.embeddings.cls_token', 1, 1, 32),
    tensor('vision_tower.embeddings.position_embeddings', 1, 17, 32),
    tensor('vision_tower.embeddings.patch_embeddings.projection.weight', 32, 3, 8, 8),
    tensor('vision_tower.embeddings.patch_embeddings.projection.bias', 32),
    tensor(`${layer}.layernorm_before.weight`, 32),
    tensor(`${layer}.layernorm_before.bias`, 32),
    tensor(`${layer}.layernorm_after.weight`, 32),
    tensor(`${layer}.layernorm_after.bias`, 32),
    ...linear(`${layer}.attention.q_proj`, 32, 32),
    ...linear(`${layer}.attention.k_proj`, 32, 32),
    ...linear(`${layer}.attention.v_proj`, 32, 32),
    ...linear(`${layer}.attention.projection_layer`, 32, 32),
    ...linear(`${layer}.mlp.fc1`, 48, 32),
    ...linear(`${layer}.mlp.fc2`, 32, 48),
    tensor(`${layer}.lambda_1`, 32),
    tensor(`${layer}.lambda_2`, 32),
    tensor('multi_modal_projector.layer_norm.weight', 128),
    tensor('multi_modal_projector.layer_norm.bias', 128),
    ...linear('multi_modal_projector.linear_1', 64, 128),
    ...linear('multi_modal_projector.linear_2', 64, 64),
  ];
}

/** The same tower in the original layout: q, k and v in one tensor. */
export function chatVisionTensors(): TestTensor[] {
  const renamed = new Map([
    ['vision_tower.embeddings.cls_token', 'vision_model.embeddings.class_embedding'],
    ['vision_tower.embeddings.position_embeddings', 'vision_model.embeddings.position_embedding'],
    ['multi_modal_projector.layer_norm', 'mlp1.0'],
    ['multi_modal_projector.linear_1', 'mlp1.1'],
    ['multi_modal_projector.linear_2', 'mlp1.3'],
    [
      'vision_tower.embeddings.patch_embeddings.projection',
      'vision_model.embeddings.patch_embedding',
    ],
    ['vision_tower.encoder.layer.', 'vision_model.encoder.layers.'],
    ['.layernorm_before', '.norm1'],
    ['.layernorm_after', '.norm2'],
    ['.attention.projection_layer', '.attn.proj'],
    ['.lambda_1', '.ls1'],
    ['.lambda_2', '.ls2'],
  ]);
  const plain = hfVisionTensors().filter(({ name }) => !/[qkv]_proj/.test(name));
  return [
    ...plain.map(({ name, ...rest }) => ({
      name: [...renamed].reduce((text, [from, to]) => text.replace(from, to), name),
      ...rest,
    })),
    { name: 'vision_model.encoder.layers.0.attn.qkv.weight', dtype: 'BF16', shape: [96, 32] },
    { name: 'vision_model.encoder.layers.0.attn.qkv.bias', dtype: 'BF16', shape: [96] },
  ];
}

export function hfConfig(fields: Json = {}, vision: Json = {}, text: Json = {}): Json {
  return {
    architectures: ['InternVLForConditionalGeneration'],
    downsample_ratio: 0.5,
    image_seq_length: 4,
    image_token_id: 261,
    projector_hidden_act: 'gelu',
    vision_feature_layer: -1,
    vision_feature_select_strategy: 'default',
    text_config: textConfig(text),
    vision_config: {
      attention_bias: true,
      hidden_act: 'gelu',
      hidden_size: 32,
      image_size: [32, 32],
      intermediate_size: 48,
      layer_norm_eps: 1e-6,
      norm_type: 'layer_norm',
      num_attention_heads: 2,
      num_channels: 3,
      num_hidden_layers: 1,
      patch_size: [8, 8],
      use_absolute_position_embeddings: true,
      use_mean_pooling: true,
      use_qk_norm: false,
      ...vision,
    },
    ...fields,
  };
}

export function chatConfig(fields: Json = {}, vision: Json = {}, llm: Json = {}): Json {
  return {
    architectures: ['InternVLChatModel'],
    downsample_ratio: 0.5,
    dynamic_image_size: true,
    force_image_size: 32,
    max_dynamic_patch: 6,
    min_dynamic_patch: 1,
    pad2square: false,
    ps_version: 'v2',
    select_layer: -1,
    template: 'internvl2_5',
    use_thumbnail: true,
    llm_config: textConfig(llm),
    vision_config: {
      hidden_act: 'gelu',
      hidden_size: 32,
      image_size: 32,
      intermediate_size: 48,
      layer_norm_eps: 1e-6,
      norm_type: 'layer_norm',
      num_attention_heads: 2,
      num_hidden_layers: 1,
      patch_size: 8,
      qk_normalization: false,
      qkv_bias: true,
      ...vision,
    },
    ...fields,
  };
}

export const SPECIAL_TOKENS = [
  '<|endoftext|>',
  '<|im_start|>',
  '<|im_end|>',
  '<img>',
  '</img>',
  '<IMG_CONTEXT>',
] as const;

/** GPT-2's byte alphabet, written independently of lib/tokenizer.ts: as Python's reference does. */
export function byteAlphabet(): string[] {
  const range = (first: number, last: number): number[] =>
    Array.from({ length: last - first + 1 }, (_, index) => first + index);
  const printable = [...range(33, 126), ...range(161, 172), ...range(174, 255)];
  const others = range(0, 255).filter((byte) => !printable.includes(byte));
  const chars = new Map(printable.map((byte) => [byte, String.fromCodePoint(byte)]));
  for (const [index, byte] of others.entries()) chars.set(byte, String.fromCodePoint(256 + index));
  return range(0, 255).map((byte) => chars.get(byte) ?? '');
}

/** A byte-level tokenizer: id = byte for 0..255, special tokens from 256, then merged tokens. */
export function byteLevelTokenizer(merges: readonly (readonly [string, string])[] = []): Json {
  const tokens = [...byteAlphabet()];
  const vocab = Object.fromEntries(tokens.map((token, id) => [token, id]));
  for (const [index, [left, right]] of merges.entries()) {
    vocab[left + right] = 256 + SPECIAL_TOKENS.length + index;
  }
  return {
    version: '1.0',
    added_tokens: SPECIAL_TOKENS.map((content, index) => ({
      id: 256 + index,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    })),
    normalizer: { type: 'NFC' },
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: true },
    post_processor: { type: 'ByteLevel' },
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab, merges: merges.map((pair) => [...pair]) },
  };
}

/** A sentencepiece-style tokenizer with byte fallback: `<0xNN>` ids 3..258, then some words. */
export function sentencepieceTokenizer(): Json {
  const bytes = Array.from({ length: 256 }, (_, byte) => {
    return `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`;
  });
  const words = ['▁', 'a', 'b', '▁a', '▁ab', 'é', '好', '▁▁'];
  const tokens = ['<unk>', '<s>', '</s>', ...bytes, ...words];
  return {
    version: '1.0',
    added_tokens: ['<unk>', '<s>', '</s>'].map((content, id) => ({ id, content, special: true })),
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'Prepend', prepend: '▁' },
        { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
      ],
    },
    pre_tokenizer: null,
    post_processor: null,
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: {
      type: 'BPE',
      unk_token: '<unk>',
      byte_fallback: true,
      fuse_unk: true,
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges: [
        ['▁', 'a'],
        ['▁a', 'b'],
        ['▁', '▁'],
      ],
    },
  };
}

/** Runs `action` and checks the code and the message of its TurbomindError. */
export async function expectError(
  action: () => unknown,
  code: TurbomindErrorCode,
  message: RegExp,
): Promise<void> {
  const error: unknown = await Promise.resolve()
    .then(action)
    .then(
      () => undefined,
      (reason: unknown) => reason,
    );
  expect(error).toBeInstanceOf(TurbomindError);
  if (!(error instanceof TurbomindError)) return;
  expect({ code: error.code, message: error.message }).toEqual({
    code,
    message: expect.stringMatching(message),
  });
}
