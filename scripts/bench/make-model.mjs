// Writes a Hugging Face folder of Qwen2.5-0.5B's shape with random AWQ weights (gemm, 4 bit, group
// 128) and a tied bf16 embedding: 0.46 GB.   node make-model.mjs OUT [--tokenizer FOLDER]
import { closeSync, mkdirSync, openSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { bf16, f16, Random, SHAPE as S } from './model-shape.mjs';
import { makeTokenizer } from './tokenizer.mjs';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { tokenizer: { type: 'string' } },
});
const out = positionals[0];
if (!out) throw new Error('usage: make-model.mjs OUT [--tokenizer FOLDER]');
mkdirSync(out, { recursive: true });
const random = new Random(42);
const GROUP = 128;

/** [name, dtype, shape, fill] in file order. */
const tensors = [];
const vector = (name, n, mean, deviation) =>
  tensors.push([
    name,
    'BF16',
    [n],
    (bytes) => {
      const v = new Uint16Array(bytes.buffer);
      for (let i = 0; i < v.length; i++) v[i] = bf16(mean + deviation * random.normal());
    },
  ]);
function awq(name, k, n) {
  tensors.push([`${name}.qweight`, 'I32', [k, n / 8], (bytes) => random.fill(bytes)]);
  tensors.push([
    `${name}.qzeros`,
    'I32',
    [k / GROUP, n / 8],
    (bytes) => {
      for (let i = 0; i < bytes.length; i++)
        bytes[i] = 0x77 + (random.next() % 2) + 16 * (random.next() % 2);
    },
  ]);
  const deviation = 0.7 / Math.sqrt(k) / 4.6;
  tensors.push([
    `${name}.scales`,
    'F16',
    [k / GROUP, n],
    (bytes) => {
      const v = new Uint16Array(bytes.buffer);
      for (let i = 0; i < v.length; i++) v[i] = f16(deviation * (0.75 + 0.5 * random.uniform()));
    },
  ]);
}
tensors.push([
  'model.embed_tokens.weight',
  'BF16',
  [S.vocab, S.hidden],
  (bytes) => {
    const v = new Uint16Array(bytes.buffer);
    const block = new Uint16Array(65_521);
    for (let i = 0; i < block.length; i++) block[i] = bf16(0.02 * random.normal());
    for (let at = 0; at < v.length; at += block.length) {
      block[random.next() % block.length] = bf16(0.02 * random.normal());
      v.set(block.subarray(0, Math.min(block.length, v.length - at)), at);
    }
  },
]);
for (let i = 0; i < S.layers; i++) {
  const layer = `model.layers.${i}`;
  vector(`${layer}.input_layernorm.weight`, S.hidden, 1, 0.05);
  for (const [p, n] of [
    ['q', S.heads],
    ['k', S.kvHeads],
    ['v', S.kvHeads],
  ]) {
    awq(`${layer}.self_attn.${p}_proj`, S.hidden, n * S.headDim);
    vector(`${layer}.self_attn.${p}_proj.bias`, n * S.headDim, 0, 0.02);
  }
  awq(`${layer}.self_attn.o_proj`, S.heads * S.headDim, S.hidden);
  vector(`${layer}.post_attention_layernorm.weight`, S.hidden, 1, 0.05);
  awq(`${layer}.mlp.gate_proj`, S.hidden, S.intermediate);
  awq(`${layer}.mlp.up_proj`, S.hidden, S.intermediate);
  awq(`${layer}.mlp.down_proj`, S.intermediate, S.hidden);
}
vector('model.norm.weight', S.hidden, 1, 0.05);

const SIZE = { BF16: 2, F16: 2, I32: 4 };
const header = { __metadata__: { format: 'pt' } };
let offset = 0;
for (const [name, dtype, shape] of tensors) {
  const bytes = shape.reduce((a, b) => a * b, SIZE[dtype]);
  header[name] = { dtype, shape, data_offsets: [offset, offset + bytes] };
  offset += bytes;
}
let text = JSON.stringify(header);
text = text.padEnd(Math.ceil(text.length / 8) * 8, ' ');
const file = openSync(join(out, 'model.safetensors'), 'w');
const length = Buffer.alloc(8);
length.writeBigUInt64LE(BigInt(text.length));
writeSync(file, length);
writeSync(file, text);
for (const [name, , , fill] of tensors) {
  const [begin, end] = header[name].data_offsets;
  const bytes = new Uint8Array(end - begin);
  fill(bytes);
  for (let at = 0; at < bytes.length; at += 1 << 28)
    writeSync(file, bytes, at, Math.min(1 << 28, bytes.length - at));
}
closeSync(file);

const tokenizer = makeTokenizer(values.tokenizer);
writeFileSync(join(out, 'tokenizer.json'), JSON.stringify(tokenizer.json));
writeFileSync(
  join(out, 'tokenizer_config.json'),
  JSON.stringify({ ...tokenizer.config, chat_template: undefined }),
);
writeFileSync(
  join(out, 'config.json'),
  JSON.stringify(
    {
      architectures: ['Qwen2ForCausalLM'],
      model_type: 'qwen2',
      torch_dtype: 'bfloat16',
      hidden_act: 'silu',
      hidden_size: S.hidden,
      intermediate_size: S.intermediate,
      num_hidden_layers: S.layers,
      num_attention_heads: S.heads,
      num_key_value_heads: S.kvHeads,
      max_position_embeddings: S.positions,
      rms_norm_eps: S.normEps,
      rope_theta: S.ropeTheta,
      tie_word_embeddings: true,
      use_sliding_window: false,
      sliding_window: null,
      vocab_size: S.vocab,
      bos_token_id: 151_643,
      eos_token_id: 151_643,
      quantization_config: {
        quant_method: 'awq',
        bits: 4,
        group_size: GROUP,
        zero_point: true,
        version: 'gemm',
      },
    },
    null,
    2,
  ),
);
writeFileSync(
  join(out, 'generation_config.json'),
  JSON.stringify({ do_sample: false, eos_token_id: 151_643 }),
);
