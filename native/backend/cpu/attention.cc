// An op is three passes: rotate and store, which is here, and the plan's items and the joining of tiles whose
// splits went to several threads (attention_tiles.cc).
#include "backend/cpu/attention.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/kernels/row_norm.h"

namespace turbomind::cpu {
namespace {

constexpr int kTokenGrain = 16;  // tokens a thread rotates at a time: a cache line of K^T
// x * cos + rotate_half(x) * sin, each product rounded, as Hugging Face computes it.
void rotate(float* head, const float* cosine, const float* sine, int half) {
  for (int i = 0; i < half; ++i) {
    const float a = head[i];
    const float b = head[i + half];
    head[i] = a * cosine[i] + -b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

}  // namespace

PagedAttention::PagedAttention(Isa isa, ThreadPool& pool)
    : isa_(isa), kernels_(attention_kernels(isa)), pool_(pool) {}

size_t PagedAttention::scratch_floats(int head_dim, bool gathers) const {
  const int fixed = kMaxTileRows * (2 * head_dim + 2 * kRowStride + 4);
  const int gathered = gathers ? kMaxChunks * 2 * head_dim * kChunkKeys : 0;
  return round_up(static_cast<size_t>(fixed + gathered), size_t{16});
}

size_t PagedAttention::partial_floats(int head_dim) const {
  return round_up(static_cast<size_t>(kMaxTileRows) * (head_dim + 2), size_t{16});
}

PagedAttention::ScratchBytes PagedAttention::sizes(const AttentionLimits& limits) const {
  const auto threads = static_cast<size_t>(pool_.size());
  const auto dim = static_cast<size_t>(limits.max_head_dim);
  return {static_cast<size_t>(limits.max_tokens) * dim * sizeof(float),
          threads *
              scratch_floats(limits.max_head_dim, gathers(limits.block_size, limits.quantized)) *
              sizeof(float),
          AttentionPlan::max_partials(limits.max_kv_len, pool_.size()) *
              partial_floats(limits.max_head_dim) * sizeof(float)};
}

size_t PagedAttention::scratch_bytes(const AttentionLimits& limits) const {
  const ScratchBytes bytes = sizes(limits);
  return bytes.rope_table + bytes.scratch + bytes.partials;
}

void PagedAttention::reserve(const AttentionLimits& limits) {
  const ScratchBytes bytes = sizes(limits);
  rope_table_.reserve(bytes.rope_table, "the rotary table");
  scratch_.reserve(bytes.scratch, "attention scratch");
  partials_.reserve(bytes.partials, "attention partial results");
  plan_.reserve(limits.max_tokens, limits.max_sequences, limits.max_heads, limits.max_kv_len,
                pool_.size());
}

void PagedAttention::begin_step(const StepBatch& batch) {
  batch_ = batch;
  planned_heads_ = 0;
  rope_source_ = nullptr;
}

void PagedAttention::check(const AttentionArgs& args) const {
  TM_CHECK(args.cache != nullptr, "attention without a KV cache");
  TM_CHECK(args.head_dim > 0 && args.head_dim % kLanes == 0 && args.head_dim <= kSplitKeys,
           "attention with head_dim %d: the CPU backend needs a multiple of %d up to %d",
           args.head_dim, kLanes, kSplitKeys);
  TM_CHECK(args.num_kv_heads > 0 && args.num_heads % args.num_kv_heads == 0,
           "%d attention heads over %d KV heads", args.num_heads, args.num_kv_heads);
  const KvCacheSpec& spec = args.cache->spec();
  TM_CHECK(spec.num_kv_heads == args.num_kv_heads && spec.head_dim == args.head_dim &&
               args.layer >= 0 && args.layer < spec.num_layers,
           "layer %d with %d KV heads of %d does not fit a cache of %d layers, %d heads of %d",
           args.layer, args.num_kv_heads, args.head_dim, spec.num_layers, spec.num_kv_heads,
           spec.head_dim);
  const int tokens = batch_.num_tokens();
  const int64_t row = static_cast<int64_t>(args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  TM_CHECK(args.qkv.dtype == DType::f32 && args.qkv.elements() == tokens * row,
           "qkv holds %lld values, %d tokens of %lld are needed",
           static_cast<long long>(args.qkv.elements()), tokens, static_cast<long long>(row));
  TM_CHECK(args.y.dtype == DType::f32 &&
               args.y.elements() == int64_t{tokens} * args.num_heads * args.head_dim,
           "attention output holds %lld values for %d tokens",
           static_cast<long long>(args.y.elements()), tokens);
  TM_CHECK(args.rope.inv_freq.elements() == args.head_dim / 2,
           "rope has %lld frequencies for head_dim %d",
           static_cast<long long>(args.rope.inv_freq.elements()), args.head_dim);
  const int64_t num_slots = int64_t{spec.num_blocks} * spec.block_size;
  for (int32_t slot : batch_.slots) {
    TM_CHECK(slot >= 0 && slot < num_slots, "KV slot %d of %lld", slot,
             static_cast<long long>(num_slots));
  }
}

// Takes indices one by one, so that a thread that lost its core leaves its share to the others.
template <class Body>
void PagedAttention::for_each(int64_t count, Body&& body) {
  if (count == 0) return;
  if (count == 1 || pool_.size() == 1) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  pool_.run([&](int thread) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i, thread);
  });
}

void PagedAttention::make_rope_table(const AttentionArgs& args) {
  if (rope_source_ == args.rope.inv_freq.data && rope_scaling_ == args.rope.attention_scaling) {
    return;
  }
  const int half = args.head_dim / 2;
  const int tokens = batch_.num_tokens();
  rope_table_.reserve(static_cast<size_t>(tokens) * 2 * half * sizeof(float), "the rotary table");
  const float* inv_freq = args.rope.inv_freq.as<float>();
  const float scaling = args.rope.attention_scaling;
  float* table = rope_table_.floats();
  pool_.parallel_for(tokens, kTokenGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = table + t * 2 * half;
      for (int i = 0; i < half; ++i) {
        // The product is a float32 as in the reference; its cosine is exact to the last bit.
        const float angle = static_cast<float>(batch_.positions[t]) * inv_freq[i];
        row[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * scaling;
        row[half + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * scaling;
      }
    }
  });
  rope_source_ = args.rope.inv_freq.data;
  rope_scaling_ = scaling;
}

void PagedAttention::rotate_and_store(const AttentionArgs& args, int token) const {
  const int dim = args.head_dim;
  const int half = dim / 2;
  const int heads = args.num_heads + 2 * args.num_kv_heads;
  float* row = args.qkv.as<float>() + static_cast<int64_t>(token) * heads * dim;
  const float* cosine = rope_table_.floats() + static_cast<int64_t>(token) * dim;
  for (int h = 0; h < args.num_heads + args.num_kv_heads; ++h) {
    float* head = row + h * dim;
    const Norm* norm = h < args.num_heads ? args.q_norm : args.k_norm;
    if (norm != nullptr) row_norm(row_norm_of(*norm, dim), head, head, dim, isa_);
    rotate(head, cosine, cosine + half, half);
  }
  const auto& cache = static_cast<const CpuKvCache&>(*args.cache);
  const int block_size = cache.spec().block_size;
  const BlockId block = batch_.slots[token] / block_size;
  const int offset = batch_.slots[token] % block_size;
  for (int h = 0; h < args.num_kv_heads; ++h) {
    const float* k = row + (args.num_heads + h) * dim;
    const float* v = k + args.num_kv_heads * dim;
    if (cache.quantized()) {
      QuantizedVector key;
      QuantizedVector value;
      kernels_.quantize(k, dim, cache.spec().bits, key);
      kernels_.quantize(v, dim, cache.spec().bits, value);
      cache.store(args.layer, block, h, offset, key, value);
      continue;
    }
    float* keys = cache.keys(args.layer, block, h) + offset;
    for (int d = 0; d < dim; ++d) keys[d * block_size] = k[d];
    std::copy(v, v + dim, cache.values(args.layer, block, h) + offset * dim);
  }
}

void PagedAttention::plan(int num_heads, int num_kv_heads) {
  if (planned_heads_ == num_heads && planned_kv_heads_ == num_kv_heads) return;
  plan_.build(batch_, num_heads / num_kv_heads, num_kv_heads, pool_.size());
  planned_heads_ = num_heads;
  planned_kv_heads_ = num_kv_heads;
}

void PagedAttention::run(const AttentionArgs& args) {
  check(args);
  const int tokens = batch_.num_tokens();
  const int kv_heads = args.num_kv_heads;
  make_rope_table(args);
  pool_.parallel_for(tokens, kTokenGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) rotate_and_store(args, static_cast<int>(t));
  });
  plan(args.num_heads, kv_heads);
  scratch_.reserve(
      pool_.size() * scratch_floats(args.head_dim, gathers(args.cache->spec())) * sizeof(float),
      "attention scratch");
  partials_.reserve(static_cast<size_t>(plan_.num_partials()) * kv_heads *
                        partial_floats(args.head_dim) * sizeof(float),
                    "attention partial results");
  for_each(static_cast<int64_t>(plan_.items().size()) * kv_heads, [&](int64_t i, int thread) {
    run_item(args, plan_.items()[i / kv_heads], static_cast<int>(i % kv_heads), thread);
  });
  for_each(static_cast<int64_t>(plan_.split_tiles().size()) * kv_heads, [&](int64_t i, int thread) {
    const AttentionTile& tile = plan_.tiles()[plan_.split_tiles()[i / kv_heads]];
    merge_partials(args, tile, static_cast<int>(i % kv_heads), thread);
  });
}

}  // namespace turbomind::cpu
