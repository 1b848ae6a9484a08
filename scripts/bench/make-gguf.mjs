// Writes the peer's model: the same shape as make-model.mjs in GGUF, random Q4_0 blocks, Q8_0 tied
// embedding.   node make-gguf.mjs OUT.gguf [--tokenizer FOLDER]
// Format: github.com/ggml-org/ggml docs/gguf.md (version 3, little endian, alignment 32).
import { closeSync, openSync, writeSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { f16, Random, SHAPE as S } from './model-shape.mjs';
import { makeTokenizer } from './tokenizer.mjs';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { tokenizer: { type: 'string' } },
});
const random = new Random(43);
const tokenizer = makeTokenizer(values.tokenizer);
const tokens = new Array(S.vocab);
const types = new Int32Array(S.vocab).fill(5); // unused
for (const [text, id] of Object.entries(tokenizer.json.model.vocab)) {
  tokens[id] = text;
  types[id] = 1;
}
for (const t of tokenizer.json.added_tokens) {
  if (t.id < S.vocab) {
    tokens[t.id] = t.content;
    types[t.id] = 3;
  }
}
for (let i = 0; i < S.vocab; i++) tokens[i] ??= `[PAD${i}]`;
const merges = tokenizer.json.model.merges.map((m) => (Array.isArray(m) ? m.join(' ') : m));

const parts = [];
const u32 = (v) => {
  const b = Buffer.alloc(4);
  b.writeUInt32LE(v);
  parts.push(b);
};
const u64 = (v) => {
  const b = Buffer.alloc(8);
  b.writeBigUInt64LE(BigInt(v));
  parts.push(b);
};
const f32 = (v) => {
  const b = Buffer.alloc(4);
  b.writeFloatLE(v);
  parts.push(b);
};
const str = (s) => {
  const b = Buffer.from(s, 'utf8');
  u64(b.length);
  parts.push(b);
};
let keys = 0;
const meta = [];
const kv = (write) => {
  keys++;
  meta.push(write);
};
const put = {
  u32: (k, v) =>
    kv(() => {
      str(k);
      u32(4);
      u32(v);
    }),
  f32: (k, v) =>
    kv(() => {
      str(k);
      u32(6);
      f32(v);
    }),
  str: (k, v) =>
    kv(() => {
      str(k);
      u32(8);
      str(v);
    }),
  bool: (k, v) =>
    kv(() => {
      str(k);
      u32(7);
      parts.push(Buffer.from([v ? 1 : 0]));
    }),
  strs: (k, v) =>
    kv(() => {
      str(k);
      u32(9);
      u32(8);
      u64(v.length);
      for (const s of v) str(s);
    }),
  i32s: (k, v) =>
    kv(() => {
      str(k);
      u32(9);
      u32(5);
      u64(v.length);
      parts.push(Buffer.from(v.buffer));
    }),
};
put.str('general.architecture', 'qwen2');
put.str('general.name', 'random');
put.u32('general.file_type', 2);
put.u32('qwen2.context_length', S.positions);
put.u32('qwen2.embedding_length', S.hidden);
put.u32('qwen2.block_count', S.layers);
put.u32('qwen2.feed_forward_length', S.intermediate);
put.u32('qwen2.attention.head_count', S.heads);
put.u32('qwen2.attention.head_count_kv', S.kvHeads);
put.f32('qwen2.attention.layer_norm_rms_epsilon', S.normEps);
put.f32('qwen2.rope.freq_base', S.ropeTheta);
put.str('tokenizer.ggml.model', 'gpt2');
put.str('tokenizer.ggml.pre', 'qwen2');
put.strs('tokenizer.ggml.tokens', tokens);
put.i32s('tokenizer.ggml.token_type', types);
put.strs('tokenizer.ggml.merges', merges);
put.u32('tokenizer.ggml.eos_token_id', 151_643);
put.bool('tokenizer.ggml.add_bos_token', false);

const F32 = 0;
const Q4_0 = 2;
const Q8_0 = 8;
const BYTES = { [F32]: [1, 4], [Q4_0]: [32, 18], [Q8_0]: [32, 34] };
const tensors = [];
const add = (name, type, dims, deviation = 0) => tensors.push({ name, type, dims, deviation });
add('token_embd.weight', Q8_0, [S.hidden, S.vocab], 0.02);
for (let i = 0; i < S.layers; i++) {
  const b = `blk.${i}`;
  const d = 0.7 / Math.sqrt(S.hidden);
  add(`${b}.attn_norm.weight`, F32, [S.hidden], 1);
  for (const [p, n] of [
    ['q', S.heads],
    ['k', S.kvHeads],
    ['v', S.kvHeads],
  ]) {
    add(`${b}.attn_${p}.weight`, Q4_0, [S.hidden, n * S.headDim], d);
    add(`${b}.attn_${p}.bias`, F32, [n * S.headDim], 0.02);
  }
  add(`${b}.attn_output.weight`, Q4_0, [S.heads * S.headDim, S.hidden], d);
  add(`${b}.ffn_norm.weight`, F32, [S.hidden], 1);
  add(`${b}.ffn_gate.weight`, Q4_0, [S.hidden, S.intermediate], d);
  add(`${b}.ffn_up.weight`, Q4_0, [S.hidden, S.intermediate], d);
  add(`${b}.ffn_down.weight`, Q4_0, [S.intermediate, S.hidden], 0.7 / Math.sqrt(S.intermediate));
}
add('output_norm.weight', F32, [S.hidden], 1);

function fill(t) {
  const n = t.dims.reduce((a, b) => a * b, 1);
  const [block, bytes] = BYTES[t.type];
  const data = Buffer.alloc((n / block) * bytes);
  if (t.type === F32) {
    for (let i = 0; i < n; i++)
      data.writeFloatLE(
        t.deviation === 1 ? 1 + 0.05 * random.normal() : t.deviation * random.normal(),
        i * 4,
      );
    return data;
  }
  random.fill(data);
  const scale = t.type === Q4_0 ? t.deviation / 4.6 : t.deviation / 73;
  for (let at = 0; at < data.length; at += bytes)
    data.writeUInt16LE(f16(scale * (0.75 + 0.5 * random.uniform())), at);
  return data;
}

const file = openSync(positionals[0], 'w');
let written = 0;
const flush = () => {
  for (const b of parts.splice(0)) {
    writeSync(file, b);
    written += b.length;
  }
};
parts.push(Buffer.from('GGUF'));
u32(3);
u64(tensors.length);
u64(keys);
for (const write of meta) write();
let offset = 0;
for (const t of tensors) {
  const [block, bytes] = BYTES[t.type];
  str(t.name);
  u32(t.dims.length);
  for (const d of t.dims) u64(d);
  u32(t.type);
  u64(offset);
  t.bytes = (t.dims.reduce((a, b) => a * b, 1) / block) * bytes;
  offset += Math.ceil(t.bytes / 32) * 32;
}
const all = Buffer.concat(parts.splice(0));
writeSync(file, all);
written = all.length;
const pad = () => {
  const n = (32 - (written % 32)) % 32;
  if (n) {
    writeSync(file, Buffer.alloc(n));
    written += n;
  }
};
pad();
for (const t of tensors) {
  const data = fill(t);
  for (let at = 0; at < data.length; at += 1 << 28)
    writeSync(file, data, at, Math.min(1 << 28, data.length - at));
  written += data.length;
  pad();
}
flush();
closeSync(file);
