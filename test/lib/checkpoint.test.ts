import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { type Checkpoint, openCheckpoint } from '../../lib/checkpoint/checkpoint.js';
import type { TurbomindErrorCode } from '../../lib/errors.js';
import type { TensorEntry } from '../../lib/native-types.js';
import {
  byteLevelTokenizer,
  chatConfig,
  chatVisionTensors,
  decoderTensors,
  expectError,
  hfConfig,
  hfVisionTensors,
  type Json,
  type TestTensor,
  temporaryFolder,
  textConfig,
  writeModelFolder,
  writeSafetensors,
} from './model-folder.js';

const AWQ: Json = {
  quant_method: 'awq',
  bits: 4,
  group_size: 32,
  zero_point: true,
  version: 'gemm',
};

async function open(
  config: Json,
  tensors: readonly TestTensor[],
  files: Record<string, Json | string> = {},
): Promise<Checkpoint> {
  return openCheckpoint(await writeModelFolder(config, tensors, files));
}

function find(checkpoint: Checkpoint, name: string): TensorEntry {
  const entry = checkpoint.tensors.find((tensor) => tensor.name === name);
  if (entry === undefined) throw new Error(`no tensor ${name}`);
  return entry;
}

const names = (checkpoint: Checkpoint): string[] => checkpoint.tensors.map(({ name }) => name);

describe('a text model', () => {
  test('becomes a spec, field by field', async () => {
    const checkpoint = await open(textConfig(), decoderTensors());
    expect(checkpoint.architecture).toBe('Qwen2ForCausalLM');
    expect(checkpoint.spec).toEqual({
      decoder: {
        hiddenSize: 64,
        numLayers: 2,
        numHeads: 4,
        numKvHeads: 2,
        headDim: 16,
        intermediateSize: 128,
        vocabSize: 320,
        maxPositionEmbeddings: 512,
        normEps: 1e-6,
        ropeTheta: 10000,
        qkvBias: true,
        qkNorm: false,
        tiedEmbeddings: false,
      },
      quant: { method: 'none', groupSize: 0 },
      imageTokenId: -1,
    });
    expect(checkpoint.image).toBeUndefined();
    expect(checkpoint.totals.unusedTensors).toBe(0);
    expect(checkpoint.tensors).toHaveLength(decoderTensors().length);
  });

  test('counts parameters and bytes', async () => {
    const { totals } = await open(textConfig(), decoderTensors({ dtype: 'F32' }));
    const layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64 + 64 + 32 + 32 + 64 + 64;
    const parameters = 2 * layer + 2 * 320 * 64 + 64;
    const bytes = parameters * 4;
    expect(totals).toEqual({ parameters, bytes, bytesByDType: { f32: bytes }, unusedTensors: 0 });
  });

  test('of Qwen3 has head norms and no biases', async () => {
    const config = textConfig({ architectures: ['Qwen3ForCausalLM'], head_dim: 16 });
    const tensors = decoderTensors({ qkvBias: false, qkNorm: true });
    const checkpoint = await open(config, tensors);
    expect(checkpoint.spec.decoder).toMatchObject({ qkvBias: false, qkNorm: true });
    expect(find(checkpoint, 'layers.1.attn.k_norm.weight').shape).toEqual([16]);
  });

  test('of Llama has neither', async () => {
    const config = textConfig({ architectures: ['LlamaForCausalLM'] });
    const checkpoint = await open(config, decoderTensors({ qkvBias: false }));
    expect(checkpoint.spec.decoder).toMatchObject({ qkvBias: false, qkNorm: false });
    expect(names(checkpoint).filter((name) => name.includes('bias'))).toEqual([]);
  });

  test('may lack the model. prefix', async () => {
    const tensors = decoderTensors({ prefix: '', head: undefined });
    const checkpoint = await open(textConfig({ tie_word_embeddings: true }), tensors);
    expect(names(checkpoint)).toContain('embed_tokens.weight');
  });

  test('with tied embeddings has no head, even if the file stores one', async () => {
    const checkpoint = await open(textConfig({ tie_word_embeddings: true }), decoderTensors());
    expect(checkpoint.spec.decoder.tiedEmbeddings).toBe(true);
    expect(names(checkpoint)).not.toContain('lm_head.weight');
    expect(checkpoint.totals.unusedTensors).toBe(1);
  });

  test('that says nothing about its head is tied exactly if none is stored', async () => {
    const config = textConfig({ tie_word_embeddings: null });
    const tied = await open(config, decoderTensors({ head: undefined }));
    const untied = await open(config, decoderTensors());
    expect([tied, untied].map(({ spec }) => spec.decoder.tiedEmbeddings)).toEqual([true, false]);
  });

  test('takes its rope base from rope_parameters first', async () => {
    const rope = { rope_parameters: { rope_type: 'default', rope_theta: 5e5 }, rope_theta: 1e4 };
    const checkpoint = await open(textConfig(rope), decoderTensors());
    expect(checkpoint.spec.decoder.ropeTheta).toBe(5e5);
  });

  test('with dynamic rope runs as default up to its positions', async () => {
    const rope = { rope_scaling: { rope_type: 'dynamic', type: 'dynamic', factor: 2 } };
    const checkpoint = await open(textConfig(rope), decoderTensors());
    expect(checkpoint.spec.decoder.ropeTheta).toBe(1e4);
    expect(checkpoint.maxPositionEmbeddings).toBe(512);
  });

  test('with a window that no layer uses is accepted', async () => {
    const window = { sliding_window: 128, use_sliding_window: true, max_window_layers: 2 };
    await expect(open(textConfig(window), decoderTensors())).resolves.toBeDefined();
    const off = { sliding_window: 128, use_sliding_window: false };
    await expect(open(textConfig(off), decoderTensors())).resolves.toBeDefined();
  });

  test('in shards names each file once', async () => {
    const folder = await temporaryFolder();
    const tensors = decoderTensors();
    const shardOf = (index: number) => `model-0000${1 + (index % 2)}-of-00002.safetensors`;
    const shards = [0, 1].map((shard) => tensors.filter((_, index) => index % 2 === shard));
    for (const [index, shard] of shards.entries()) {
      await writeSafetensors(join(folder, shardOf(index)), shard);
    }
    const weight_map = Object.fromEntries(tensors.map(({ name }, i) => [name, shardOf(i)]));
    await writeFile(join(folder, 'config.json'), JSON.stringify(textConfig()));
    await writeFile(join(folder, 'model.safetensors.index.json'), JSON.stringify({ weight_map }));
    const checkpoint = await openCheckpoint(folder);
    expect([...checkpoint.files].sort()).toEqual([
      join(folder, shardOf(0)),
      join(folder, shardOf(1)),
    ]);
    const embed = find(checkpoint, 'embed_tokens.weight');
    expect(checkpoint.files[embed.file]).toBe(join(folder, shardOf(0)));
    const norm = find(checkpoint, 'layers.0.post_attention_norm.weight');
    expect(checkpoint.files[norm.file]).toBe(join(folder, shardOf(0)));
  });
});

describe('AWQ weights', () => {
  test('become three tensors a linear layer, with biases beside them', async () => {
    const config = textConfig({ quantization_config: AWQ });
    const checkpoint = await open(config, decoderTensors({ groupSize: 32 }));
    expect(checkpoint.spec.quant).toEqual({ method: 'awq', groupSize: 32 });
    expect(find(checkpoint, 'layers.0.mlp.down.qweight')).toMatchObject({
      dtype: 'i32',
      shape: [128, 8],
    });
    expect(find(checkpoint, 'layers.0.mlp.down.qzeros')).toMatchObject({
      dtype: 'i32',
      shape: [4, 8],
    });
    expect(find(checkpoint, 'layers.0.mlp.down.scales')).toMatchObject({
      dtype: 'f16',
      shape: [4, 64],
    });
    expect(find(checkpoint, 'layers.0.attn.k.bias')).toMatchObject({ dtype: 'bf16', shape: [32] });
    const dense = await open(textConfig(), decoderTensors());
    expect(checkpoint.totals.parameters).toBe(dense.totals.parameters);
  });

  test('may leave some layers dense', async () => {
    const tensors = decoderTensors({ groupSize: 32 }).filter(
      ({ name }) => !name.includes('layers.1.mlp.up_proj'),
    );
    tensors.push({ name: 'model.layers.1.mlp.up_proj.weight', dtype: 'F16', shape: [128, 64] });
    const checkpoint = await open(textConfig({ quantization_config: AWQ }), tensors);
    expect(find(checkpoint, 'layers.1.mlp.up.weight').dtype).toBe('f16');
    expect(find(checkpoint, 'layers.0.mlp.up.qweight').dtype).toBe('i32');
  });

  test('of a group that does not divide the inputs are refused', async () => {
    const config = textConfig({ quantization_config: { ...AWQ, group_size: 128 } });
    await expectError(
      () => open(config, decoderTensors({ groupSize: 32 })),
      'ERR_TM_UNSUPPORTED_QUANTIZATION',
      /q_proj has 64 inputs .* groups of 128/,
    );
  });

  test('without a quantization_config are refused', async () => {
    await expectError(
      () => open(textConfig(), decoderTensors({ groupSize: 32 })),
      'ERR_TM_UNSUPPORTED_QUANTIZATION',
      /q_proj.qweight is packed, but config.json has no quantization_config/,
    );
  });

  test.each<[string, Json, RegExp]>([
    ['GPTQ', { quant_method: 'gptq', bits: 4 }, /quant_method is "gptq"; supported: AWQ/],
    ['no method', { quant_method: null }, /quant_method is "unnamed"/],
    ['the gemv layout', { ...AWQ, version: 'gemv' }, /version is "gemv"/],
    ['8 bits', { ...AWQ, bits: 8 }, /bits is 8/],
    ['groups of 48', { ...AWQ, group_size: 48 }, /group_size is 48/],
    ['one group', { ...AWQ, group_size: -1 }, /group_size is -1/],
    ['no zero points', { ...AWQ, zero_point: false }, /zero_point is false/],
  ])('with %s are refused with what is supported', async (_, quantization_config, message) => {
    await expectError(
      () => open(textConfig({ quantization_config }), decoderTensors({ groupSize: 32 })),
      'ERR_TM_UNSUPPORTED_QUANTIZATION',
      message,
    );
  });
});

const HF_TOKENIZER = { 'tokenizer.json': byteLevelTokenizer() };
const hfTensors = (): TestTensor[] => [
  ...decoderTensors({ prefix: 'language_model.model.', head: 'language_model.lm_head' }),
  ...hfVisionTensors(),
];
const chatTensors = (): TestTensor[] => [
  ...decoderTensors({ prefix: 'language_model.model.', head: 'language_model.lm_head' }),
  ...chatVisionTensors(),
];

describe('an InternVL model in the -hf layout', () => {
  test('becomes a decoder and a vision tower', async () => {
    const checkpoint = await open(hfConfig(), hfTensors(), HF_TOKENIZER);
    expect(checkpoint.spec.imageTokenId).toBe(261);
    expect(checkpoint.spec.vision).toEqual({
      imageSize: 32,
      patchSize: 8,
      hiddenSize: 32,
      numLayers: 1,
      numHeads: 2,
      intermediateSize: 48,
      normEps: 1e-6,
      rmsNorm: false,
      qkvBias: true,
      qkNorm: false,
      shuffleFactor: 2,
      projectorNormEps: 1e-5,
      mean: [0.485, 0.456, 0.406],
      std: [0.229, 0.224, 0.225],
    });
    expect(checkpoint.image).toEqual({
      tileSize: 32,
      tokensPerTile: 4,
      minDynamicPatch: 1,
      maxDynamicPatch: 12,
      useThumbnail: true,
      startToken: '<img>',
      endToken: '</img>',
      contextToken: '<IMG_CONTEXT>',
    });
    expect(checkpoint.totals.unusedTensors).toBe(0);
  });

  test('reads newer names with the outer model. prefix to the same table', async () => {
    const newer = [
      ...decoderTensors({ prefix: 'model.language_model.', head: 'lm_head' }),
      ...hfVisionTensors('model.'),
    ];
    const checkpoints = [
      await open(hfConfig(), hfTensors(), HF_TOKENIZER),
      await open(hfConfig(), newer, HF_TOKENIZER),
    ];
    const [older = [], renamed = []] = checkpoints.map((checkpoint) => names(checkpoint));
    expect(renamed).toEqual(older);
  });

  test('takes statistics and tile limits from the preprocessor', async () => {
    const preprocessor = {
      image_mean: [0.5, 0.5, 0.5],
      image_std: [0.25, 0.25, 0.25],
      max_patches: 4,
      min_patches: 2,
      size: { height: 32, width: 32 },
    };
    const files = { ...HF_TOKENIZER, 'preprocessor_config.json': preprocessor };
    const own = await open(hfConfig(), hfTensors(), files);
    const nested = await open(hfConfig(), hfTensors(), {
      ...HF_TOKENIZER,
      'processor_config.json': { image_processor: preprocessor },
    });
    for (const checkpoint of [own, nested]) {
      expect(checkpoint.spec.vision).toMatchObject({
        mean: [0.5, 0.5, 0.5],
        std: [0.25, 0.25, 0.25],
      });
      expect(checkpoint.image).toMatchObject({ minDynamicPatch: 2, maxDynamicPatch: 4 });
    }
  });

  test('runs fewer layers for an earlier feature layer', async () => {
    const config = hfConfig({ vision_feature_layer: -2 }, { num_hidden_layers: 2 });
    const checkpoint = await open(config, hfTensors(), HF_TOKENIZER);
    expect(checkpoint.spec.vision?.numLayers).toBe(1);
  });

  test.each<[string, Json, TurbomindErrorCode, RegExp]>([
    [
      'another image token id',
      hfConfig({ image_token_id: 7 }),
      'ERR_TM_INVALID_CONFIG',
      /image_token_id is 7; expected 261 \(<IMG_CONTEXT>\)/,
    ],
    [
      'another token count',
      hfConfig({ image_seq_length: 256 }),
      'ERR_TM_INVALID_CONFIG',
      /image_seq_length is 256; expected 4/,
    ],
    [
      'a ratio that is no fraction 1/n',
      hfConfig({ downsample_ratio: 0.7 }),
      'ERR_TM_UNSUPPORTED_MODEL',
      /downsample_ratio is 0.7/,
    ],
    [
      'a tile that patches do not fill',
      hfConfig({}, { patch_size: 7 }),
      'ERR_TM_INVALID_CONFIG',
      /patch_size is 7; expected a divisor/,
    ],
    [
      'oblong tiles',
      hfConfig({}, { image_size: [32, 64] }),
      'ERR_TM_INVALID_CONFIG',
      /vision_config.image_size is \[32,64\]; expected a square/,
    ],
    [
      'a final norm',
      hfConfig({}, { use_mean_pooling: false }),
      'ERR_TM_UNSUPPORTED_MODEL',
      /use_mean_pooling is false; supported: true/,
    ],
    [
      'another activation',
      hfConfig({}, { hidden_act: 'quick_gelu' }),
      'ERR_TM_UNSUPPORTED_MODEL',
      /vision_config.hidden_act is "quick_gelu"; supported: "gelu"/,
    ],
    [
      'another norm',
      hfConfig({}, { norm_type: 'batch_norm' }),
      'ERR_TM_UNSUPPORTED_MODEL',
      /norm_type is "batch_norm"/,
    ],
    [
      'kept class tokens',
      hfConfig({ vision_feature_select_strategy: 'full' }),
      'ERR_TM_UNSUPPORTED_MODEL',
      /select_strategy is "full"/,
    ],
    [
      'no vision_config',
      hfConfig({ vision_config: null }),
      'ERR_TM_INVALID_CONFIG',
      /vision_config is missing/,
    ],
    [
      'another language model',
      hfConfig({}, {}, { architectures: ['GptOssForCausalLM'] }),
      'ERR_TM_UNSUPPORTED_MODEL',
      /text_config.architectures is "GptOssForCausalLM"; supported language models: Qwen2/,
    ],
    [
      'a feature layer before the first',
      hfConfig({ vision_feature_layer: -2 }),
      'ERR_TM_INVALID_CONFIG',
      /vision_feature_layer is -2/,
    ],
  ])('with %s is refused', async (_, config, code, message) => {
    await expectError(() => open(config, hfTensors(), HF_TOKENIZER), code, message);
  });

  test.each<[string, Json, TurbomindErrorCode, RegExp]>([
    [
      'another resampling',
      { resample: 2 },
      'ERR_TM_UNSUPPORTED_MODEL',
      /preprocessor_config.json: resample is 2; supported: 3/,
    ],
    [
      'another size',
      { size: { height: 448, width: 448 } },
      'ERR_TM_INVALID_CONFIG',
      /size is .*448.*expected the vision tower's 32/,
    ],
    ['two means', { image_mean: [0.5, 0.5] }, 'ERR_TM_INVALID_CONFIG', /image_mean is \[0.5,0.5\]/],
    ['a zero deviation', { image_std: [0, 1, 1] }, 'ERR_TM_INVALID_CONFIG', /image_std/],
    [
      'absurd tile limits',
      { max_patches: 1e9 },
      'ERR_TM_INVALID_CONFIG',
      /max_patches is 1000000000/,
    ],
    [
      'limits in reverse',
      { max_patches: 2, min_patches: 3 },
      'ERR_TM_INVALID_CONFIG',
      /min_dynamic_patch is 3/,
    ],
  ])('with a preprocessor of %s is refused', async (_, preprocessor, code, message) => {
    const files = { ...HF_TOKENIZER, 'preprocessor_config.json': preprocessor };
    await expectError(() => open(hfConfig(), hfTensors(), files), code, message);
  });

  test('needs an id that is a number', async () => {
    const code = 'ERR_TM_INVALID_TOKENIZER';
    for (const files of [
      { 'added_tokens.json': { '<IMG_CONTEXT>': 1.5 } },
      { 'tokenizer_config.json': { added_tokens_decoder: { x: { content: '<IMG_CONTEXT>' } } } },
      { 'tokenizer.json': { added_tokens: [{ content: '<IMG_CONTEXT>', id: 'x' }] } },
    ]) {
      await expectError(
        () => open(hfConfig(), hfTensors(), files),
        code,
        /give <IMG_CONTEXT> the id/,
      );
    }
  });

  test('needs an embedding for its image token', async () => {
    const files = { 'added_tokens.json': { '<IMG_CONTEXT>': 320 } };
    const config = hfConfig({ image_token_id: null });
    const code = 'ERR_TM_INVALID_CONFIG';
    await expectError(
      () => open(config, hfTensors(), files),
      code,
      /vocab_size is 320; expected more/,
    );
  });

  test('needs a tokenizer or an id for its image token', async () => {
    const config = hfConfig({ image_token_id: null });
    await expectError(() => open(config, hfTensors()), 'ERR_TM_INVALID_TOKENIZER', /<IMG_CONTEXT>/);
  });
});

describe('an InternVL model in the original layout', () => {
  test('splits the fused qkv by rows, without copying', async () => {
    const checkpoint = await open(chatConfig(), chatTensors(), HF_TOKENIZER);
    const [q, k, v] = ['q', 'k', 'v'].map((part) =>
      find(checkpoint, `vision.layers.0.attn.${part}.weight`),
    );
    const [qBias, , vBias] = ['q', 'k', 'v'].map((part) =>
      find(checkpoint, `vision.layers.0.attn.${part}.bias`),
    );
    const bytes = 32 * 32 * 2;
    expect([q?.shape, q?.bytes, k?.bytes, v?.bytes]).toEqual([[32, 32], bytes, bytes, bytes]);
    expect([(k?.offset ?? 0) - (q?.offset ?? 0), (v?.offset ?? 0) - (q?.offset ?? 0)]).toEqual([
      bytes,
      2 * bytes,
    ]);
    expect([qBias?.shape, (vBias?.offset ?? 0) - (qBias?.offset ?? 0)]).toEqual([[32], 128]);
  });

  test('has the same canonical tensors as the -hf layout', async () => {
    const hf = await open(hfConfig(), hfTensors(), HF_TOKENIZER);
    const chat = await open(chatConfig(), chatTensors(), HF_TOKENIZER);
    expect(names(chat).sort()).toEqual(names(hf).sort());
    expect(chat.spec).toEqual(hf.spec);
    expect(chat.totals).toEqual(hf.totals);
    expect(chat.image).toMatchObject({ tokensPerTile: 4, maxDynamicPatch: 6, useThumbnail: true });
    expect(chat.chatTemplate).toEqual({ type: 'named', name: 'internvl2_5' });
  });

  test('uses a stored head whatever its flags say', async () => {
    const config = chatConfig({ tie_word_embeddings: true }, {}, { tie_word_embeddings: true });
    const stored = await open(config, chatTensors(), HF_TOKENIZER);
    const without = chatTensors().filter(({ name }) => !name.includes('lm_head'));
    const tied = await open(config, without, HF_TOKENIZER);
    expect([stored, tied].map(({ spec }) => spec.decoder.tiedEmbeddings)).toEqual([false, true]);
  });

  test('cuts one tile an image without dynamic sizes', async () => {
    const config = chatConfig({ dynamic_image_size: false });
    const { image } = await open(config, chatTensors(), HF_TOKENIZER);
    expect(image).toMatchObject({ minDynamicPatch: 1, maxDynamicPatch: 1, useThumbnail: false });
  });

  test('of the 6B tower has RMS norms, head norms and no biases', async () => {
    const config = chatConfig(
      {},
      { norm_type: 'rms_norm', qk_normalization: true, qkv_bias: false },
    );
    const tensors = chatTensors().filter(({ name }) => !/(norm\d|qkv)\.bias/.test(name));
    for (const part of ['q', 'k']) {
      const name = `vision_model.encoder.layers.0.attn.${part}_norm.weight`;
      tensors.push({ name, dtype: 'BF16', shape: [32] });
    }
    const checkpoint = await open(config, tensors, HF_TOKENIZER);
    expect(checkpoint.spec.vision).toMatchObject({ rmsNorm: true, qkNorm: true, qkvBias: false });
    expect(find(checkpoint, 'vision.layers.0.attn.q_norm.weight').shape).toEqual([32]);
  });

  test.each<[string, Json, RegExp]>([
    [
      'the first pixel shuffle',
      chatConfig({ ps_version: 'v1' }),
      /ps_version is "v1"; supported: "v2"/,
    ],
    ['no pixel shuffle version', chatConfig({ ps_version: null }), /ps_version is absent/],
    ['padding', chatConfig({ pad2square: true }), /pad2square is true/],
    ['a forced tile size', chatConfig({ force_image_size: 64 }), /force_image_size is 64/],
    ['an unmerged adapter', chatConfig({ use_llm_lora: 16 }), /use_llm_lora is 16/],
  ])('with %s is refused', async (_, config, message) => {
    const files = HF_TOKENIZER;
    await expectError(
      () => open(config, chatTensors(), files),
      'ERR_TM_UNSUPPORTED_MODEL',
      message,
    );
  });
});

describe('a config', () => {
  test.each<[string, Json, RegExp]>([
    [
      'an unknown architecture',
      { architectures: ['MambaForCausalLM'] },
      /architectures is \["MambaForCausalLM"\]; supported: InternVL/,
    ],
    ['no architecture', { architectures: null }, /architectures is null; supported/],
    [
      'yarn rope',
      { rope_scaling: { type: 'yarn', factor: 4 } },
      /rope_scaling.rope_type is "yarn"; supported: "default"/,
    ],
    ['llama3 rope', { rope_parameters: { rope_type: 'llama3' } }, /rope_type is "llama3"/],
    ['rope by layer type', { rope_parameters: { full_attention: {} } }, /full_attention/],
    ['partial rope', { partial_rotary_factor: 0.5 }, /partial_rotary_factor is 0.5; supported: 1/],
    [
      'a window in use',
      { use_sliding_window: true, sliding_window: 64, max_window_layers: 1 },
      /sliding_window is 64/,
    ],
    [
      'windowed layer types',
      { layer_types: ['full_attention', 'sliding_attention'] },
      /layer_types is "sliding_attention"/,
    ],
    ['another activation', { hidden_act: 'gelu' }, /hidden_act is "gelu"; supported: "silu"/],
    [
      'biases everywhere',
      { architectures: ['LlamaForCausalLM'], attention_bias: true },
      /attention_bias is true/,
    ],
    ['MLP biases', { mlp_bias: true }, /mlp_bias is true/],
  ])('that asks for %s is refused', async (_, fields, message) => {
    const code = 'ERR_TM_UNSUPPORTED_MODEL';
    await expectError(() => open(textConfig(fields), decoderTensors()), code, message);
  });

  test.each<[string, Json, RegExp]>([
    ['no hidden size', { hidden_size: null }, /config.json: hidden_size is missing/],
    ['a hidden size of text', { hidden_size: '64' }, /hidden_size is "64"; expected a number/],
    ['a negative size', { hidden_size: -64 }, /hidden_size is -64; expected a number from 1/],
    ['an absurd layer count', { num_hidden_layers: 1e9 }, /num_hidden_layers is 1000000000/],
    [
      'a fractional layer count',
      { num_hidden_layers: 1.5 },
      /num_hidden_layers is 1.5; expected a whole/,
    ],
    ['an absurd vocabulary', { vocab_size: 1e12 }, /vocab_size/],
    [
      'KV heads that do not divide',
      { num_key_value_heads: 3 },
      /num_key_value_heads is 3; expected a divisor of 4/,
    ],
    [
      'heads that do not divide',
      { num_attention_heads: 5, num_key_value_heads: 5 },
      /num_attention_heads is 5/,
    ],
    ['odd heads', { head_dim: 15 }, /head_dim is 15; expected an even/],
    [
      'a flag of text',
      { tie_word_embeddings: 'yes' },
      /tie_word_embeddings is "yes"; expected true or false/,
    ],
    ['a rope base of 0', { rope_theta: 0 }, /rope_theta is 0/],
    ['a list for an object', { rope_scaling: [] }, /rope_scaling is \[\]; expected an object/],
    ['no eos that is a number', { eos_token_id: 'x' }, /eos_token_id is "x"/],
  ])('with %s is refused', async (_, fields, message) => {
    const code = 'ERR_TM_INVALID_CONFIG';
    await expectError(() => open(textConfig(fields), decoderTensors()), code, message);
  });

  test('is not looked up in the prototype', async () => {
    const folder = await writeModelFolder(textConfig(), decoderTensors());
    const { hidden_size: hidden, ...rest } = textConfig();
    const polluted = JSON.stringify(rest).replace('{', `{"__proto__":{"hidden_size":${hidden}},`);
    await writeFile(join(folder, 'config.json'), polluted);
    await expectError(
      () => openCheckpoint(folder),
      'ERR_TM_INVALID_CONFIG',
      /hidden_size is missing/,
    );
  });

  test('may begin with a byte order mark', async () => {
    const folder = await writeModelFolder(textConfig(), decoderTensors());
    await writeFile(join(folder, 'config.json'), `\uFEFF${JSON.stringify(textConfig())}`);
    await expect(openCheckpoint(folder)).resolves.toBeDefined();
  });

  test.each<[string, string, RegExp]>([
    ['is not JSON', '{"a":', /config.json is not valid JSON/],
    ['is a list', '[]', /config.json does not hold a JSON object/],
  ])('that %s is refused', async (_, text, message) => {
    const folder = await writeModelFolder(textConfig(), decoderTensors(), { 'config.json': text });
    await expectError(() => openCheckpoint(folder), 'ERR_TM_INVALID_CONFIG', message);
  });

  test('that is missing is refused', async () => {
    const folder = await temporaryFolder();
    const code = 'ERR_TM_INVALID_CONFIG';
    await expectError(() => openCheckpoint(folder), code, /config.json is missing/);
  });
});

test('a folder that does not exist, or is a file, is refused', async () => {
  const folder = await writeModelFolder(textConfig(), decoderTensors());
  const code = 'ERR_TM_MODEL_NOT_FOUND';
  await expectError(() => openCheckpoint(join(folder, 'none')), code, /no model folder at/);
  await expectError(
    () => openCheckpoint(join(folder, 'config.json')),
    code,
    /is a file; pass the folder/,
  );
});

describe('weights', () => {
  test('that are missing are listed at once, up to ten', async () => {
    const without = decoderTensors().filter(({ name }) => !name.includes('layers.1.'));
    const code = 'ERR_TM_MISSING_TENSOR';
    await expectError(
      () => open(textConfig(), without),
      code,
      /(model\.layers\.1\.\S+ ){10}and 2 more; is a shard/,
    );
    const one = decoderTensors().filter(({ name }) => name !== 'lm_head.weight');
    await expectError(() => open(textConfig(), one), code, /lacks lm_head.weight; is a shard/);
  });

  test('of other shapes or dtypes are refused with both', async () => {
    const change = (name: string, fields: Partial<TestTensor>): TestTensor[] =>
      decoderTensors().map((tensor) => (tensor.name === name ? { ...tensor, ...fields } : tensor));
    const code = 'ERR_TM_TENSOR_MISMATCH';
    const shape = change('model.norm.weight', { shape: [65] });
    await expectError(
      () => open(textConfig(), shape),
      code,
      /model.norm.weight is BF16 \[65\], expected F32\/F16\/BF16 \[64\]/,
    );
    const rank = change('model.norm.weight', { shape: [1, 64] });
    await expectError(() => open(textConfig(), rank), code, /BF16 \[1, 64\]/);
    const dtype = change('model.norm.weight', { dtype: 'I64' });
    await expectError(() => open(textConfig(), dtype), code, /model.norm.weight is I64 \[64\]/);
  });

  test('that the model does not use are counted', async () => {
    const tensors = [
      ...decoderTensors(),
      { name: 'model.layers.0.self_attn.rotary_emb.inv_freq', dtype: 'F32', shape: [8] },
    ];
    const { totals } = await open(textConfig(), tensors);
    expect(totals.unusedTensors).toBe(1);
  });
});

describe('generation defaults', () => {
  test('come from generation_config.json', async () => {
    const generation = {
      eos_token_id: [258, 256, 258],
      do_sample: true,
      temperature: 0.7,
      top_k: 20,
      top_p: 0.8,
      repetition_penalty: 1.05,
      max_new_tokens: 100,
      transformers_version: '5.0.0',
    };
    const checkpoint = await open(textConfig(), decoderTensors(), {
      'generation_config.json': generation,
    });
    expect(checkpoint.generation).toEqual({
      eosTokenIds: [258, 256],
      doSample: true,
      temperature: 0.7,
      topK: 20,
      topP: 0.8,
      repetitionPenalty: 1.05,
      maxNewTokens: 100,
    });
  });

  test("take the language model's eos token when no file states one", async () => {
    const checkpoint = await open(hfConfig({ eos_token_id: 1 }), hfTensors(), HF_TOKENIZER);
    expect(checkpoint.generation).toEqual({ eosTokenIds: [258] });
  });

  test('of the wrong type are refused', async () => {
    const files = { 'generation_config.json': { temperature: 'hot' } };
    await expectError(
      () => open(textConfig(), decoderTensors(), files),
      'ERR_TM_INVALID_CONFIG',
      /generation_config.json: temperature is "hot"/,
    );
  });
});

describe('the chat template', () => {
  const templateOf = async (files: Record<string, Json | string>) => {
    const { chatTemplate } = await open(textConfig(), decoderTensors(), files);
    return chatTemplate?.type === 'jinja' ? chatTemplate.template : chatTemplate;
  };
  const config = (chat_template: unknown) => ({ 'tokenizer_config.json': { chat_template } });

  test('is its own file first, then JSON, then in tokenizer_config.json', async () => {
    const json = { 'chat_template.json': { chat_template: 'json' }, ...config('config') };
    expect(await templateOf({ 'chat_template.jinja': 'file', ...json })).toBe('file');
    expect(await templateOf(json)).toBe('json');
    expect(await templateOf(config('config'))).toBe('config');
    expect(await templateOf({})).toBeUndefined();
  });

  test('is the default one of a list', async () => {
    const tool = { name: 'tool_use', template: 'tools' };
    const normal = { name: 'default', template: 'normal' };
    expect(await templateOf(config([tool, normal]))).toBe('normal');
    expect(await templateOf(config([tool]))).toBe('tools');
  });

  test('of another type is refused', async () => {
    const code = 'ERR_TM_INVALID_TEMPLATE';
    await expectError(() => templateOf(config(7)), code, /neither a string nor a list/);
    await expectError(() => templateOf(config([])), code, /neither a string nor a list/);
  });
});
