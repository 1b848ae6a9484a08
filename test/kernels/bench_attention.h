// kernel_bench: attention of decode steps, drafts, prompts and pictures over a paged cache.
#pragma once

#include <cmath>
#include <memory>
#include <set>

#include "backend/cuda/kernels/kernels.h"
#include "bench_report.h"

namespace turbomind::cuda::testing {

inline const std::set<std::string> kAttentionParts = {"decode", "drafts", "prefill", "vision"};

// A paged cache and the step arrays of `batch` sequences of `length` keys each.
struct Paged {
  int heads, kv_heads, dim, batch, length, queries, bits;
  std::vector<std::unique_ptr<DeviceArray<char>>> caches;  // one layer each, rotated through
  std::unique_ptr<DeviceArray<uint16_t>> qkv, y;
  std::unique_ptr<DeviceArray<int32_t>> positions, slots, start, len, split, stride, table;
  std::unique_ptr<DeviceArray<int2>> items, tiles;
  std::unique_ptr<DeviceArray<float>> freq;
  std::unique_ptr<DeviceArray<uint32_t>> records;
  StepArrays step;
  int num_items = 0, num_tiles = 0;
  size_t cache_bytes = 0;  // of a layer

  Paged(int q, int kv, int d, int sequences, int keys, int rows, size_t copies_bytes, int kv_bits = 16)
      : heads(q), kv_heads(kv), dim(d), batch(sequences), length(keys), queries(rows), bits(kv_bits) {
    const int blocks = ceil_div(keys, kBlockTokens);
    cache_bytes = static_cast<size_t>(sequences) * blocks * kv * 2 * kv_tile_bytes(d, kv_bits);
    const size_t copies = std::clamp<size_t>(copies_bytes / cache_bytes + 1, 1, 64);
    for (size_t i = 0; i < copies; ++i) {
      caches.push_back(std::make_unique<DeviceArray<char>>(cache_bytes));
      fill_random(caches.back()->get(), cache_bytes, false);
    }
    std::vector<int32_t> h_positions, h_slots, h_start{0}, h_len, h_split, h_table;
    std::vector<int2> h_items, h_tiles;
    for (int s = 0; s < sequences; ++s) {
      for (int t = keys - rows; t < keys; ++t) {
        h_positions.push_back(t);
        h_slots.push_back((s + (t / kBlockTokens) * sequences) * kBlockTokens + t % kBlockTokens);
      }
      h_start.push_back(static_cast<int32_t>(h_positions.size()));
      h_len.push_back(keys);
      h_split.push_back(static_cast<int32_t>(h_items.size()));
      for (int b = 0; b < blocks; ++b) h_table.push_back(s + b * sequences);
      for (int i = 0; rows <= kMaxDecodeRows && i < ceil_div(keys, kSplitTokens); ++i) h_items.push_back({s, i});
      for (int i = 0; rows > kMaxDecodeRows && i < rows; i += kQueryTile) h_tiles.push_back({s, i});
    }
    num_items = static_cast<int>(h_items.size());
    num_tiles = static_cast<int>(h_tiles.size());
    h_items.push_back({-1, 0});
    h_tiles.push_back({-1, 0});
    positions = std::make_unique<DeviceArray<int32_t>>(h_positions);
    slots = std::make_unique<DeviceArray<int32_t>>(h_slots);
    start = std::make_unique<DeviceArray<int32_t>>(h_start);
    len = std::make_unique<DeviceArray<int32_t>>(h_len);
    split = std::make_unique<DeviceArray<int32_t>>(h_split);
    stride = std::make_unique<DeviceArray<int32_t>>(std::vector<int32_t>{blocks, num_items});
    table = std::make_unique<DeviceArray<int32_t>>(h_table);
    items = std::make_unique<DeviceArray<int2>>(h_items);
    tiles = std::make_unique<DeviceArray<int2>>(h_tiles);
    freq = std::make_unique<DeviceArray<float>>(std::vector<float>(static_cast<size_t>(d) / 2, 0.01F));
    records = std::make_unique<DeviceArray<uint32_t>>(h_items.size() * static_cast<size_t>(std::min(rows, kMaxDecodeRows)) *
                                                      decode_record_bytes(q, d) / sizeof(uint32_t));
    qkv = std::make_unique<DeviceArray<uint16_t>>(static_cast<size_t>(sequences) * rows * (q + 2 * kv) * d);
    fill_random(qkv->get(), qkv->size() * 2, false);
    y = std::make_unique<DeviceArray<uint16_t>>(static_cast<size_t>(sequences) * rows * q * d);
    step = {.positions = positions->get(), .slots = slots->get(), .query_start = start->get(), .kv_len = len->get(),
            .split_start = split->get(), .decode_items = items->get(), .query_tiles = tiles->get(),
            .block_stride = stride->get(), .block_table = table->get()};
  }
  void rope(const LaunchContext& context, int i, void* x) const {
    rope_kv(context, DType::bf16, {.qkv = x, .cache = caches[static_cast<size_t>(i) % caches.size()]->get(), .kv_bits = bits,
                                   .rope = {.inv_freq = freq->get()}, .positions = positions->get(), .slots = slots->get(),
                                   .tokens = batch * queries, .num_heads = heads, .num_kv_heads = kv_heads, .head_dim = dim});
  }
  // fused: with what `rope` does.
  void attend(const LaunchContext& context, int i, const void* x, void* out, bool portable = false, bool fused = false) const {
    const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
    char* cache = caches[static_cast<size_t>(i) % caches.size()]->get();
    if (queries <= kMaxDecodeRows) {
      decode_attention(context, DType::bf16, {.qkv = x, .y = out, .cache = cache, .kv_bits = bits, .rope = {.inv_freq = fused ? freq->get() : nullptr}, .step = step, .num_items = num_items,
                                              .max_rows = queries, .records = records->get(), .num_heads = heads, .num_kv_heads = kv_heads,
                                              .head_dim = dim, .softmax_scale = scale});
    } else {
      prefill_attention(context, DType::bf16, {.qkv = x, .y = out, .cache = cache, .kv_bits = bits, .step = step, .tokens = batch * queries, .num_tiles = num_tiles,
                                               .num_heads = heads, .num_kv_heads = kv_heads, .head_dim = dim, .softmax_scale = scale, .portable = portable});
    }
  }
};

// part: "decode", "drafts", "prefill" or "vision" alone; else all.
inline void bench_attention(Report& report, const LaunchContext& context, const std::string& part) {
  const auto wanted = [&](const char* name) { return part == name || !kAttentionParts.contains(part); };
  const auto decode = [&](int q, int kv, int batch, int length, int rows, int bits) {
    // More caches than L2 keeps anything of, whatever it evicts first.
    const Paged paged(q, kv, 128, batch, length, rows, size_t{3} << 30, bits);
    const double us = time_us(24, [&](int i) { paged.attend(context, i, paged.qkv->get(), paged.y->get(), false, true); });
    report.add("decode_attention", format("%d/%d x 128, %d rows of %d, %d keys, %d bits", q, kv, rows, batch, length, bits), us,
               static_cast<double>(paged.cache_bytes), 4.0 * batch * rows * q * 128.0 * length);
  };
  for (const int bits : {16, 8, 4}) {
    if (!wanted("decode")) break;
    for (const auto& [q, kv, batch, length] : {std::tuple{40, 8, 1, 1024}, {40, 8, 1, 8192}, {40, 8, 16, 8192}, {40, 8, 64, 1024},
                                               {16, 2, 1, 8192}, {16, 2, 16, 8192}, {16, 2, 64, 1024}}) {
      decode(q, kv, batch, length, 1, bits);
    }
  }
  if (wanted("drafts")) {
    decode(40, 8, 1, 8192, 5, 16);
    decode(40, 8, 16, 8192, 5, 16);
    decode(16, 2, 1, 8192, 5, 16);
  }
  const auto prefill = [&](int q, int kv, int length, int bits, bool portable = false) {
    const Paged paged(q, kv, 128, 1, length, length, 0, bits);
    const double us = time_us(4, [&](int i) { paged.attend(context, i, paged.qkv->get(), paged.y->get(), portable); });
    report.add(portable ? "prefill_attention_mma_sync" : "prefill_attention", format("%d/%d x 128, causal %d, %d bits", q, kv, length, bits), us,
               static_cast<double>(paged.cache_bytes), 2.0 * q * 128.0 * length * length);
  };
  if (wanted("prefill")) {
    for (const auto& [q, kv, length] : {std::tuple{40, 8, 1024}, {40, 8, 4096}, {40, 8, 16384}, {16, 2, 4096}}) prefill(q, kv, length, 16);
    prefill(40, 8, 4096, 16, true);
    prefill(40, 8, 4096, 8);
    prefill(40, 8, 4096, 4);
  }
  if (!wanted("vision")) return;
  const DeviceArray<uint16_t> qkv(size_t{13} * 1025 * 3072);
  fill_random(qkv.get(), qkv.size() * 2, false);
  const DeviceArray<uint16_t> y(size_t{13} * 1025 * 1024);
  for (const bool portable : {false, true}) {
    const double us = time_us(6, [&](int) {
      tile_attention(context, DType::bf16, {.qkv = qkv.get(), .y = y.get(), .num_tiles = 13, .tokens = 1025, .num_heads = 16,
                                            .head_dim = 64, .softmax_scale = 0.125F, .portable = portable});
    });
    report.add(portable ? "tile_attention_mma_sync" : "tile_attention", "13 tiles x 1025, 16 x 64", us, 8.0 * 13 * 1025 * 1024, 4.0 * 13 * 16 * 64.0 * 1025 * 1025);
  }
}

}  // namespace turbomind::cuda::testing
