// RoPE, the paged cache, decode and prefill attention, and the vision tower's attention, against a
// float64 reference; and that results do not depend on batch, chunk or run.
#include <algorithm>
#include <map>
#include <memory>
#include <string_view>

#include "backend/cuda/kernels/kernels.h"
#include "gpu_test.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda;
using namespace turbomind::cuda::testing;

struct Heads {
  int q, kv, dim;
};

// Sequences in a paged cache with scattered blocks. A call of `step` runs query rows of some of
// them, their K and V taken from `source`.
class Attention {
 public:
  Attention(const Heads& heads, DType dtype, const std::vector<int>& lengths, uint32_t seed, int bits = 16)
      : heads_(heads), dtype_(dtype), bits_(bits), lengths_(lengths), random_(seed),
        row_(static_cast<size_t>(heads.q + 2 * heads.kv) * heads.dim), context_(test_context()) {
    int blocks = 0;
    for (int length : lengths) blocks += ceil_div(length, kBlockTokens);
    num_blocks_ = blocks + 3;
    std::vector<int> order(static_cast<size_t>(num_blocks_));
    for (int i = 0; i < num_blocks_; ++i) order[static_cast<size_t>(i)] = i;
    for (int i = num_blocks_ - 1; i > 0; --i) std::swap(order[i], order[random_.below(i + 1)]);
    max_blocks_ = ceil_div(*std::max_element(lengths.begin(), lengths.end()), kBlockTokens) + 1;
    size_t next = 0;
    for (int length : lengths) {
      std::vector<int> table(static_cast<size_t>(max_blocks_), -1);
      for (int b = 0; b < ceil_div(length, kBlockTokens); ++b) table[static_cast<size_t>(b)] = order[next++];
      tables_.push_back(table);
      source_.push_back(random_.half(static_cast<size_t>(length) * row_, dtype));
    }
    norm_weights_ = random_.floats(static_cast<size_t>(2 * heads.dim), 0.2F, 1.0F);
    inv_freq_.resize(static_cast<size_t>(heads.dim) / 2);
    for (size_t i = 0; i < inv_freq_.size(); ++i) {
      inv_freq_[i] = std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(heads.dim));
    }
    // Poisoned with NaN: what lies past a sequence's end must not matter.
    cache_ = std::make_unique<DeviceArray<char>>(static_cast<size_t>(num_blocks_) * heads.kv * 2 * kv_tile_bytes(heads.dim, bits));
  }

  struct Query {
    int sequence, begin, end;  // query rows [begin, end); kv length is `end`
  };
  // Results, one row after the other, of the queries; those of at most `decode_rows` rows by the decode
  // kernel, the others by the prefill kernel. Two padding rows follow, as a captured graph has them.
  std::vector<uint16_t> step(const std::vector<Query>& queries, int decode_rows = 1) {
    std::vector<uint16_t> qkv;
    std::vector<int32_t> positions, slots, query_start{0}, kv_len, split_start, table;
    std::vector<int2> items, tiles;
    for (size_t s = 0; s < queries.size(); ++s) {
      const Query& query = queries[s];
      const auto& source = source_[static_cast<size_t>(query.sequence)];
      for (int t = query.begin; t < query.end; ++t) {
        qkv.insert(qkv.end(), source.begin() + static_cast<int64_t>(t * row_), source.begin() + static_cast<int64_t>((t + 1) * row_));
        positions.push_back(t);
        slots.push_back(tables_[query.sequence][t / kBlockTokens] * kBlockTokens + t % kBlockTokens);
      }
      query_start.push_back(static_cast<int32_t>(positions.size()));
      kv_len.push_back(query.end);
      split_start.push_back(static_cast<int32_t>(items.size()));
      table.insert(table.end(), tables_[query.sequence].begin(), tables_[query.sequence].end());
      const int rows = query.end - query.begin;
      for (int i = 0; rows <= decode_rows && i < ceil_div(query.end, kSplitTokens); ++i) items.push_back({static_cast<int>(s), i});
      for (int i = 0; rows > decode_rows && i < rows; i += kQueryTile) tiles.push_back({static_cast<int>(s), i});
    }
    const size_t rows = positions.size();
    for (int i = 0; i < 2; ++i) {
      positions.push_back(0);
      slots.push_back(-1);
      qkv.insert(qkv.end(), row_, 0x7fff);  // NaN
    }
    const auto most = static_cast<size_t>(std::max(decode_rows, 1));
    const int num_items = static_cast<int>(items.size());
    items.push_back({-1, -1});  // padding, as a captured graph has it
    items.push_back({-1, -1});
    const DeviceArray<uint16_t> device_qkv(qkv);
    const DeviceArray<int32_t> d_positions(positions), d_slots(slots), d_start(query_start), d_len(kv_len),
        d_split(split_start), d_table(table), d_stride(std::vector<int32_t>{max_blocks_, num_items});
    const DeviceArray<int2> d_items(items), d_tiles(tiles.empty() ? std::vector<int2>{{-1, 0}} : tiles);
    const DeviceArray<float> freq(inv_freq_), norms(norm_weights_);
    const DeviceArray<uint16_t> y(positions.size() * static_cast<size_t>(heads_.q) * heads_.dim);
    // Poison: all bits set.
    const DeviceArray<uint32_t> records(items.size() * most * decode_record_bytes(heads_.q, heads_.dim) / sizeof(uint32_t));
    StepArrays arrays{.positions = d_positions.get(), .slots = d_slots.get(), .query_start = d_start.get(),
                      .kv_len = d_len.get(), .split_start = d_split.get(), .decode_items = d_items.get(),
                      .query_tiles = d_tiles.get(), .block_stride = d_stride.get(), .block_table = d_table.get()};
    RopeArgs rope{.inv_freq = freq.get(), .attention_scaling = scaling_};
    if (normed_) {
      rope.q_norm = norms.get();
      rope.k_norm = norms.get() + heads_.dim;
      rope.q_norm_eps = 1e-6F;
      rope.k_norm_eps = 1e-5F;
    }
    const bool fused = fused_ && tiles.empty();
    if (!fused) {
      rope_kv(context_, dtype_, {.qkv = device_qkv.get(), .cache = cache_->get(), .kv_bits = bits_, .rope = rope,
                                 .positions = d_positions.get(), .slots = d_slots.get(),
                                 .tokens = static_cast<int>(positions.size()), .num_heads = heads_.q,
                                 .num_kv_heads = heads_.kv, .head_dim = heads_.dim});
    }
    const float scale = 1.0F / std::sqrt(static_cast<float>(heads_.dim));
    decode_attention(context_, dtype_, {.qkv = device_qkv.get(), .y = y.get(), .cache = cache_->get(),
                                        .kv_bits = bits_, .rope = fused ? rope : RopeArgs{}, .step = arrays,
                                        .num_items = num_items > 0 ? num_items + 2 : 0, .max_rows = static_cast<int>(most),
                                        .records = records.get(), .num_heads = heads_.q, .num_kv_heads = heads_.kv,
                                        .head_dim = heads_.dim, .softmax_scale = scale});
    prefill_attention(context_, dtype_, {.qkv = device_qkv.get(), .y = y.get(), .cache = cache_->get(),
                                         .kv_bits = bits_, .step = arrays,
                                         .tokens = static_cast<int>(rows), .num_tiles = static_cast<int>(tiles.size()), .num_heads = heads_.q,
                                         .num_kv_heads = heads_.kv, .head_dim = heads_.dim, .softmax_scale = scale, .portable = portable_});
    const std::vector<uint32_t> left = records.host();
    EXPECT(std::all_of(left.begin(), left.end(), [](uint32_t word) { return word == ~0U; }));
    std::vector<uint16_t> out = y.host();
    out.resize(rows * static_cast<size_t>(heads_.q) * heads_.dim);
    return out;
  }
  // Whether decode steps rotate and write K and V in the decode kernel.
  void set_fused(bool fused) { fused_ = fused; }
  // Norms of q and k heads, and a scaling of the rotation.
  void set_norms() {
    normed_ = true;
    scaling_ = 1.25F;
  }
  std::vector<char> cache() const { return cache_->host(); }
  // The bytes of the cache; none: poison.
  void set_cache(const std::vector<char>& bytes) {
    cache_->poison();
    if (!bytes.empty()) cuda_check(cudaMemcpy(cache_->get(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }
  // Whether prefill is held to mma.sync.
  void set_portable(bool portable) { portable_ = portable; }
  // Fills the cache of a sequence up to `end` tokens.
  void fill(int sequence, int end) {
    for (int begin = 0; begin < end; begin += 128) (void)step({{sequence, begin, std::min(end, begin + 128)}});
  }

  // A head of a token as the cache holds it: K after RoPE, rounded to 16 bits or quantised as
  // KvCacheSpec::bits says. head: q heads, k heads, v heads.
  std::vector<double> cached(const std::vector<uint16_t>& source, int t, int head) const {
    const int half = heads_.dim / 2;
    const bool is_v = head >= heads_.q + heads_.kv;
    std::vector<float> x(heads_.dim);
    const auto value = [&](int i) { return from_bits(source[t * row_ + static_cast<size_t>(head) * heads_.dim + i], dtype_); };
    for (int d = 0; d < heads_.dim; ++d) {
      const double angle = static_cast<double>(static_cast<float>(t) * inv_freq_[d % half]);
      const double a = value(d % half), b = value(d % half + half);
      const double r = d < half ? a * std::cos(angle) - b * std::sin(angle) : b * std::cos(angle) + a * std::sin(angle);
      x[d] = is_v ? value(d) : static_cast<float>(r);
    }
    std::vector<double> out(heads_.dim);
    const float least = *std::min_element(x.begin(), x.end());
    const float levels = static_cast<float>((1 << bits_) - 1);
    const float scale = from_bits(to_bits((*std::max_element(x.begin(), x.end()) - least) / levels, DType::f16), DType::f16);
    const float zero = from_bits(to_bits(least, DType::f16), DType::f16);
    for (int d = 0; d < heads_.dim; ++d) {
      if (bits_ == 16 || head < heads_.q) {
        out[d] = from_bits(to_bits(x[d], dtype_), dtype_);
      } else {
        const float level = scale == 0.0F ? 0.0F : std::clamp(std::nearbyint((x[d] - zero) / scale), 0.0F, levels);
        out[d] = static_cast<double>(level) * scale + zero;
      }
    }
    return out;
  }

  std::vector<double> reference(const std::vector<Query>& queries) const {
    std::vector<double> y;
    for (const Query& query : queries) {
      const auto& source = source_[static_cast<size_t>(query.sequence)];
      std::map<std::pair<int, int>, std::vector<double>> rows;
      const auto row_of = [&](int t, int head) -> const std::vector<double>& {
        auto& row = rows[{t, head}];
        if (row.empty()) row = cached(source, t, head);
        return row;
      };
      for (int t = query.begin; t < query.end; ++t) {
        for (int h = 0; h < heads_.q; ++h) {
          const int kv = h / (heads_.q / heads_.kv);
          std::vector<double> scores(t + 1), out(heads_.dim, 0.0);
          const std::vector<double> q = row_of(t, h);
          double largest = -1e300;
          for (int j = 0; j <= t; ++j) {
            const std::vector<double>& key = row_of(j, heads_.q + kv);
            double dot = 0;
            for (int d = 0; d < heads_.dim; ++d) dot += q[d] * key[d];
            scores[j] = dot / std::sqrt(static_cast<double>(heads_.dim));
            largest = std::max(largest, scores[j]);
          }
          double sum = 0;
          for (int j = 0; j <= t; ++j) {
            const double p = std::exp(scores[j] - largest);
            sum += p;
            const std::vector<double>& value = row_of(j, heads_.q + heads_.kv + kv);
            for (int d = 0; d < heads_.dim; ++d) out[d] += p * value[d];
          }
          for (int d = 0; d < heads_.dim; ++d) y.push_back(out[d] / sum);
        }
      }
    }
    return y;
  }

 private:
  Heads heads_;
  DType dtype_;
  int bits_;
  bool portable_ = false;
  bool fused_ = false;
  bool normed_ = false;
  float scaling_ = 1.0F;
  std::vector<int> lengths_;
  Random random_;
  size_t row_;
  LaunchContext context_;
  int num_blocks_ = 0;
  int max_blocks_ = 0;
  std::vector<std::vector<int>> tables_;
  std::vector<std::vector<uint16_t>> source_;  // [length, (Hq + 2 Hkv) * D]
  std::vector<float> inv_freq_;
  std::vector<float> norm_weights_;  // of q, of k
  std::unique_ptr<DeviceArray<char>> cache_;
};

// `quick` keeps the first two: every kernel runs, in a time that compute-sanitizer can take a hundredfold.
bool quick = false;
std::vector<std::pair<Heads, DType>> tested_heads() {
  std::vector<std::pair<Heads, DType>> all = {
      {{4, 2, 64}, DType::bf16}, {{5, 1, 128}, DType::bf16}, {{6, 2, 80}, DType::f16}, {{3, 3, 96}, DType::bf16},
      {{18, 1, 64}, DType::f16}, {{16, 2, 128}, DType::f16}, {{7, 1, 80}, DType::bf16}, {{4, 2, 96}, DType::f16}};
  if (quick) all.resize(2);
  return all;
}
// Probabilities and V are 16-bit: twice the rounding of an output.
double attention_tolerance(DType dtype) { return 2 * tolerance_rounded(dtype); }
// Packed caches: the integers are exact, but a level is chosen from K and V computed in f32 here and on
// the device with other sines; where the two round to neighbouring levels a value differs by one scale.
// 1% of K's values off by a level of 8 (4) bits move an output by 1e-4 (2e-3) of its norm.
double packed_tolerance(DType dtype, int bits) { return attention_tolerance(dtype) + (bits == 16 ? 0.0 : bits == 8 ? 2e-4 : 2e-3); }

TEST("decode attention equals the float64 reference at block and part edges") {
  for (const int bits : {16, 8, 4}) {
    for (const auto& [heads, dtype] : tested_heads()) {
      const std::vector<int> lengths = quick ? std::vector<int>{1, 65, 257} : std::vector<int>{1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600};
      Attention attention(heads, dtype, lengths, 3, bits);
      std::vector<Attention::Query> queries;
      for (int s = 0; s < static_cast<int>(lengths.size()); ++s) {
        attention.fill(s, lengths[s] - 1);
        queries.push_back({s, lengths[s] - 1, lengths[s]});
      }
      const double error = relative_error(to_floats(attention.step(queries), dtype), attention.reference(queries));
      std::printf("    heads %d/%d x %d, %d bits: %.2e\n", heads.q, heads.kv, heads.dim, bits, error);
      EXPECT(error < packed_tolerance(dtype, bits));
    }
  }
}

// Rows of [begin, end) one after the other, computed in chunks of the given sizes, the last repeated.
std::vector<uint16_t> in_chunks(Attention& attention, int sequence, int begin, int end, const std::vector<int>& sizes, int decode_rows) {
  std::vector<uint16_t> bits;
  size_t i = 0;
  for (int at = begin; at < end;) {
    const int size = std::min(sizes[std::min(i++, sizes.size() - 1)], end - at);
    const std::vector<uint16_t> rows = attention.step({{sequence, at, at + size}}, decode_rows);
    bits.insert(bits.end(), rows.begin(), rows.end());
    at += size;
  }
  return bits;
}

void expect_equal(const std::vector<uint16_t>& got, const std::vector<uint16_t>& wanted, DType dtype, size_t columns, const char* what) {
  EXPECT_EQ(got.size(), wanted.size());
  size_t different = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (got[i] == wanted[i]) continue;
    if (different++ > 1) continue;
    std::printf("    %s, row %zu column %zu: %.9g, wanted %.9g\n", what, i / columns, i % columns, from_bits(got[i], dtype), from_bits(wanted[i], dtype));
  }
  if (different > 0) std::printf("    %s: %zu of %zu differ\n", what, different, wanted.size());
  EXPECT_EQ(different, 0U);
}

TEST("every row has the same bits prefilled whole, in odd chunks, row by row and as drafts") {
  const int kLength = quick ? 261 : 331;
  for (const auto& [heads, dtype] : tested_heads()) {
    for (const int bits : {16, 8, 4}) {
      Attention attention(heads, dtype, {kLength}, 4, bits);
      const auto columns = static_cast<size_t>(heads.q) * heads.dim;
      const std::vector<uint16_t> whole = attention.step({{0, 0, kLength}});
      const double error = relative_error(to_floats(whole, dtype), attention.reference({{0, 0, kLength}}));
      std::printf("    heads %d/%d x %d, %d bits: %.2e\n", heads.q, heads.kv, heads.dim, bits, error);
      EXPECT(error < packed_tolerance(dtype, bits));
      expect_equal(in_chunks(attention, 0, 0, kLength, {77, 64, 9, 127, 13}, 0), whole, dtype, columns, "odd chunks");
      expect_equal(in_chunks(attention, 0, 0, kLength, {230, 1}, 1), whole, dtype, columns, "row by row");
      expect_equal(in_chunks(attention, 0, 0, kLength, {5, 3, 8, 1, 2, 7, 4, 6}, kMaxDecodeRows), whole, dtype, columns, "drafts");
      expect_equal(in_chunks(attention, 0, 0, kLength, {241, 1}, 0), whole, dtype, columns, "row by row, prefill kernel");
      attention.set_fused(true);
      expect_equal(in_chunks(attention, 0, 0, kLength, {230, 1}, 1), whole, dtype, columns, "row by row, one kernel");
      expect_equal(in_chunks(attention, 0, 0, kLength, {5, 3, 8, 1, 2, 7, 4, 6}, kMaxDecodeRows), whole, dtype, columns, "drafts, one kernel");
      attention.set_portable(true);
      expect_equal(attention.step({{0, 0, kLength}}), whole, dtype, columns, "whole, mma.sync");
      expect_equal(in_chunks(attention, 0, 0, kLength, {77, 64, 9, 127, 13}, 0), whole, dtype, columns, "odd chunks, mma.sync");
    }
  }
}

TEST("one kernel that rotates, writes K and V and attends gives the bits of two, in the cache too") {
  const std::vector<int> lengths = quick ? std::vector<int>{2, 65, 257} : std::vector<int>{1, 2, 17, 64, 65, 129, 255, 256, 257, 261, 330};
  std::vector<std::pair<Heads, DType>> heads_and_types = tested_heads();
  heads_and_types.push_back({{8, 2, 128}, DType::bf16});
  for (const auto& [heads, dtype] : heads_and_types) {
    for (const int bits : {16, 8, 4}) {
      Attention attention(heads, dtype, lengths, 6, bits);
      for (const int rows : {1, 3, kMaxDecodeRows}) {
        if (rows == 3) attention.set_norms();
        attention.set_cache({});
        std::vector<Attention::Query> before, queries;
        for (int s = 0; s < static_cast<int>(lengths.size()); ++s) {
          const int begin = std::max(0, lengths[s] - rows);
          if (begin > 0) before.push_back({s, 0, begin});
          queries.push_back({s, begin, lengths[s]});
        }
        (void)attention.step(before, 0);
        const std::vector<char> filled = attention.cache();
        attention.set_fused(false);
        const std::vector<uint16_t> wanted = attention.step(queries, rows);
        const std::vector<char> wanted_cache = attention.cache();
        attention.set_cache(filled);
        attention.set_fused(true);
        expect_equal(attention.step(queries, rows), wanted, dtype, static_cast<size_t>(heads.q) * heads.dim, "one kernel");
        EXPECT(attention.cache() == wanted_cache);
        EXPECT(wanted_cache != filled);
      }
    }
  }
}

TEST("launches of a decode layer are joined by programmatic edges in a graph") {
  const LaunchContext context = [] {
    LaunchContext c = test_context();
    cuda_check(cudaStreamCreateWithFlags(&c.stream, cudaStreamNonBlocking));
    return c;
  }();
  if (!context.programmatic) return;
  const Heads heads{8, 2, 64};
  const size_t columns = static_cast<size_t>(heads.q) * heads.dim;
  const DeviceArray<uint16_t> qkv((heads.q + 2 * heads.kv) * static_cast<size_t>(heads.dim)), y(columns);
  const DeviceArray<char> cache(static_cast<size_t>(heads.kv) * 2 * kv_tile_bytes(heads.dim, 16));
  const DeviceArray<float> weight(columns);
  const DeviceArray<uint32_t> records(decode_record_bytes(heads.q, heads.dim) / sizeof(uint32_t));
  const DeviceArray<int32_t> words(64);
  cuda_check(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal));
  const NormArgs norm_args{.weight = weight.get(), .x = y.get(), .y = y.get(), .ldx = static_cast<int64_t>(columns),
                           .ldy = static_cast<int64_t>(columns), .rows = 1, .columns = static_cast<int>(columns)};
  const RopeArgs rope{.inv_freq = weight.get()};
  const StepArrays step{.positions = words.get(), .slots = words.get(), .query_start = words.get(), .kv_len = words.get(),
                        .split_start = words.get(), .decode_items = reinterpret_cast<int2*>(words.get()),
                        .block_stride = words.get(), .block_table = words.get()};
  norm(context, DType::bf16, norm_args);
  rope_kv(context, DType::bf16, {.qkv = qkv.get(), .cache = cache.get(), .rope = rope, .positions = words.get(), .slots = words.get(),
                                 .tokens = 1, .num_heads = heads.q, .num_kv_heads = heads.kv, .head_dim = heads.dim});
  decode_attention(context, DType::bf16, {.qkv = qkv.get(), .y = y.get(), .cache = cache.get(), .rope = rope, .step = step, .num_items = 1,
                                          .records = records.get(), .num_heads = heads.q, .num_kv_heads = heads.kv, .head_dim = heads.dim, .softmax_scale = 0.125F});
  norm(context, DType::bf16, norm_args);
  cudaGraph_t graph = nullptr;
  cuda_check(cudaStreamEndCapture(context.stream, &graph));
  size_t count = 0;
  cuda_check(cudaGraphGetEdges(graph, nullptr, nullptr, nullptr, &count));
  EXPECT_EQ(count, 3U);
  std::vector<cudaGraphNode_t> from(count), to(count);
  std::vector<cudaGraphEdgeData> edges(count);
  cuda_check(cudaGraphGetEdges(graph, from.data(), to.data(), edges.data(), &count));
  for (const cudaGraphEdgeData& edge : edges) {
    EXPECT_EQ(static_cast<int>(edge.type), static_cast<int>(cudaGraphDependencyTypeProgrammatic));
    EXPECT_EQ(static_cast<int>(edge.from_port), cudaGraphKernelNodePortProgrammatic);
  }
  cuda_check(cudaGraphDestroy(graph));
  cuda_check(cudaStreamDestroy(context.stream));
}

TEST("a sequence's attention is the same bits alone, in a mixed batch and in every run") {
  for (const auto& [heads, dtype] : tested_heads()) {
    for (const int bits : {16, 4}) {
      const std::vector<int> lengths = {700, 33, 129, 300};
      Attention attention(heads, dtype, lengths, 5, bits);
      for (int s = 0; s < 4; ++s) attention.fill(s, lengths[s] - 1);
      const Attention::Query wanted{0, 699, 700};
      const std::vector<uint16_t> alone = attention.step({wanted});
      const auto in_batch = [&](const std::vector<Attention::Query>& queries, size_t row, int decode_rows) {
        const std::vector<uint16_t> all = attention.step(queries, decode_rows);
        return std::vector<uint16_t>(all.begin() + static_cast<int64_t>(row * alone.size()), all.begin() + static_cast<int64_t>((row + 1) * alone.size()));
      };
      EXPECT(attention.step({wanted}) == alone);
      EXPECT(in_batch({{1, 32, 33}, wanted, {3, 299, 300}}, 1, 1) == alone);
      EXPECT(in_batch({{2, 0, 129}, {1, 10, 33}, wanted}, 129 + 23, 1) == alone);
      EXPECT(in_batch({{2, 124, 129}, wanted, {1, 30, 33}}, 5, kMaxDecodeRows) == alone);
      attention.set_fused(true);
      EXPECT(in_batch({{1, 32, 33}, wanted, {3, 299, 300}}, 1, 1) == alone);
      EXPECT(in_batch({{2, 124, 129}, wanted, {1, 30, 33}}, 5, kMaxDecodeRows) == alone);
    }
  }
}

// 472 units of decode attention: more than a GPU has places for CTAs, so that a CTA has runs of parts, some of
// which begin or end within a sequence; and several times as many, where runs are shorter and longer than
// sequences. Alone, a sequence has about 96, one a CTA.
TEST("parts come together in the same bits within a CTA, between units and one a CTA") {
  const Heads heads{16, 8, 128};
  const std::vector<int> lengths{3000, 2819, 3072, 2600, 2900};
  const std::vector<size_t> batches = quick ? std::vector<size_t>{5, 13} : std::vector<size_t>{5, 13, 28, 60};
  for (const int bits : {16, 8, 4}) {
    Attention attention(heads, DType::bf16, lengths, 8, bits);
    // Any keys and values will do: words that are numbers of moderate size in bf16 and f16; packed tiles end with
    // f16 scales and zeros, which make levels small.
    std::vector<char> cache = attention.cache();
    const size_t tile = kv_tile_bytes(heads.dim, bits);
    Random random(9);
    for (size_t i = 0; i < cache.size(); i += 2) {
      const bool scales = bits != 16 && i % tile >= tile - 4 * kBlockTokens;
      const uint32_t word = (random.bits() & (scales ? 0x03ffU : 0x83ffU)) | (scales ? 0x1400U : 0x3c00U);
      cache[i] = static_cast<char>(word & 0xffU);
      cache[i + 1] = static_cast<char>(word >> 8);
    }
    attention.set_cache(cache);
    for (const int rows : {1, 5}) {
      attention.set_fused(false);
      std::vector<std::vector<uint16_t>> alone;
      const auto query = [&](size_t s) {
        const auto sequence = static_cast<int>(s % lengths.size());
        return Attention::Query{sequence, lengths[s % lengths.size()] - 5, lengths[s % lengths.size()] - 5 + rows};
      };
      for (size_t s = 0; s < lengths.size(); ++s) alone.push_back(attention.step({query(s)}, rows));
      for (const size_t batch : batches) {
        std::vector<Attention::Query> all;
        std::vector<uint16_t> wanted;
        for (size_t s = 0; s < batch; ++s) {  // some twice: they write the same bytes to the cache
          all.push_back(query(s));
          const std::vector<uint16_t>& same = alone[s % lengths.size()];
          wanted.insert(wanted.end(), same.begin(), same.end());
        }
        for (float value : to_floats(wanted, DType::bf16)) EXPECT(std::isfinite(value));
        for (const bool fused : {false, true}) {
          attention.set_fused(fused);
          expect_equal(attention.step(all, rows), wanted, DType::bf16, static_cast<size_t>(heads.q) * heads.dim, "in runs");
        }
      }
    }
    const Attention::Query whole{1, lengths[1] - 5, lengths[1] - 4};  // a row of prefill's
    expect_equal(attention.step({whole}, 1), attention.step({whole}, 0), DType::bf16, static_cast<size_t>(heads.q) * heads.dim, "prefill kernel");
  }
}

TEST("vision attention equals the float64 reference") {
  for (const auto& [heads, dim, tokens, dtype] :
       {std::tuple{3, 64, 257, DType::bf16}, {2, 128, 65, DType::f16}, {2, 80, 130, DType::bf16}, {4, 64, 17, DType::f16}}) {
    const int tiles = 2;
    const size_t columns = static_cast<size_t>(heads) * dim;
    Random random(7);
    const std::vector<uint16_t> bits = random.half(static_cast<size_t>(tiles) * tokens * 3 * columns, dtype);
    const std::vector<float> qkv = to_floats(bits, dtype);
    std::vector<double> expected(static_cast<size_t>(tiles) * tokens * columns, 0.0);
    for (int tile = 0; tile < tiles; ++tile) {
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < tokens; ++i) {
          const auto at = [&](int row, int part, int d) { return static_cast<double>(qkv[((static_cast<size_t>(tile) * tokens + row) * 3 + part) * columns + static_cast<size_t>(h) * dim + d]); };
          std::vector<double> p(tokens);
          double sum = 0;
          for (int j = 0; j < tokens; ++j) {
            double dot = 0;
            for (int d = 0; d < dim; ++d) dot += at(i, 0, d) * at(j, 1, d);
            p[j] = std::exp(dot / std::sqrt(static_cast<double>(dim)));
            sum += p[j];
          }
          for (int j = 0; j < tokens; ++j) {
            for (int d = 0; d < dim; ++d) expected[(static_cast<size_t>(tile) * tokens + i) * columns + static_cast<size_t>(h) * dim + d] += p[j] / sum * at(j, 2, d);
          }
        }
      }
    }
    const DeviceArray<uint16_t> device(bits);
    const DeviceArray<uint16_t> y(expected.size());
    tile_attention(test_context(), dtype, {.qkv = device.get(), .y = y.get(), .num_tiles = tiles, .tokens = tokens,
                                           .num_heads = heads, .head_dim = dim,
                                           .softmax_scale = 1.0F / std::sqrt(static_cast<float>(dim))});
    const double error = relative_error(to_floats(y.host(), dtype), expected);
    std::printf("    heads %d x %d, %d tokens: %.2e\n", heads, dim, tokens, error);
    EXPECT(error < attention_tolerance(dtype));
  }
}

// More query rows than a GPU has places for CTAs, which then take several sets of them in turn.
TEST("vision attention has the bits of mma.sync where a CTA takes rows of several tiles") {
  for (const auto& [heads, dim, tokens, tiles, dtype] :
       {std::tuple{16, 64, 200, 29, DType::bf16}, {25, 128, 130, 7, DType::f16}, {16, 64, quick ? 193 : 1025, 13, DType::f16}}) {
    const size_t columns = static_cast<size_t>(heads) * dim;
    const DeviceArray<uint16_t> qkv(Random(9).half(static_cast<size_t>(tiles) * tokens * 3 * columns, dtype));
    std::vector<uint16_t> bits[2];
    for (const bool portable : {false, true}) {
      const DeviceArray<uint16_t> y(static_cast<size_t>(tiles) * tokens * columns);
      tile_attention(test_context(), dtype, {.qkv = qkv.get(), .y = y.get(), .num_tiles = tiles, .tokens = tokens,
                                             .num_heads = heads, .head_dim = dim,
                                             .softmax_scale = 1.0F / std::sqrt(static_cast<float>(dim)), .portable = portable});
      bits[portable ? 1 : 0] = y.host();
    }
    expect_equal(bits[0], bits[1], dtype, columns, "wgmma");
  }
}

}  // namespace

// `cuda_attention_test [quick [TEXT]]`: quick for compute-sanitizer; TEXT: the cases with it in their name, so that
// several processes can share the work.
int main(int argc, char** argv) {
  quick = argc > 1 && std::string_view(argv[1]) == "quick";
  require_device();
  if (argc > 2) {
    std::erase_if(turbomind::test::cases(), [&](const auto& test) { return std::string_view(test.name).find(argv[2]) == std::string_view::npos; });
    TM_CHECK(!turbomind::test::cases().empty(), "no case has '%s' in its name", argv[2]);
  }
  return turbomind::test::run_all();
}
