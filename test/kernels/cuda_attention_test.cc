// RoPE, the paged cache, decode and prefill attention, and the vision tower's attention, against a
// float64 reference; and that results do not depend on batch, chunk or run.
#include <algorithm>
#include <map>
#include <memory>

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
  Attention(const Heads& heads, DType dtype, const std::vector<int>& lengths, uint32_t seed)
      : heads_(heads), dtype_(dtype), lengths_(lengths), random_(seed),
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
    inv_freq_.resize(static_cast<size_t>(heads.dim) / 2);
    for (size_t i = 0; i < inv_freq_.size(); ++i) {
      inv_freq_[i] = std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(heads.dim));
    }
    const size_t cache = static_cast<size_t>(num_blocks_) * heads.kv * kBlockTokens * heads.dim;
    keys_ = std::make_unique<DeviceArray<uint16_t>>(cache);    // poisoned with NaN: what lies past a
    values_ = std::make_unique<DeviceArray<uint16_t>>(cache);  // sequence's end must not matter
  }

  struct Query {
    int sequence, begin, end;  // query rows [begin, end); kv length is `end`
  };
  // Results, one row after the other, of the queries.
  std::vector<uint16_t> step(const std::vector<Query>& queries) {
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
      for (int i = 0; rows == 1 && i < ceil_div(query.end, kSplitTokens); ++i) items.push_back({static_cast<int>(s), i});
      for (int i = 0; rows > 1 && i < rows; i += kQueryTile) tiles.push_back({static_cast<int>(s), i});
    }
    const int num_items = static_cast<int>(items.size());
    items.push_back({-1, -1});  // padding, as a captured graph has it
    items.push_back({-1, -1});
    const DeviceArray<uint16_t> device_qkv(qkv);
    const DeviceArray<int32_t> d_positions(positions), d_slots(slots), d_start(query_start), d_len(kv_len),
        d_split(split_start), d_table(table), d_stride(std::vector<int32_t>{max_blocks_});
    const DeviceArray<int2> d_items(items), d_tiles(tiles.empty() ? std::vector<int2>{{-1, 0}} : tiles);
    const DeviceArray<float> freq(inv_freq_);
    const DeviceArray<uint16_t> y(positions.size() * static_cast<size_t>(heads_.q) * heads_.dim);
    const DeviceArray<float> partial_out(items.size() * heads_.q * heads_.dim);
    const DeviceArray<float2> partial_sum(items.size() * heads_.q);
    DeviceArray<uint32_t> tickets(queries.size() * heads_.q);
    tickets.zero();
    StepArrays arrays{.positions = d_positions.get(), .slots = d_slots.get(), .query_start = d_start.get(),
                      .kv_len = d_len.get(), .split_start = d_split.get(), .decode_items = d_items.get(),
                      .query_tiles = d_tiles.get(), .block_stride = d_stride.get(), .block_table = d_table.get()};
    rope_kv(context_, dtype_, {.qkv = device_qkv.get(), .k_cache = keys_->get(), .v_cache = values_->get(),
                               .inv_freq = freq.get(), .positions = d_positions.get(), .slots = d_slots.get(),
                               .tokens = static_cast<int>(positions.size()), .num_heads = heads_.q,
                               .num_kv_heads = heads_.kv, .head_dim = heads_.dim});
    const float scale = 1.0F / std::sqrt(static_cast<float>(heads_.dim));
    decode_attention(context_, dtype_, {.qkv = device_qkv.get(), .y = y.get(), .k_cache = keys_->get(),
                                        .v_cache = values_->get(), .step = arrays,
                                        .num_items = num_items > 0 ? num_items + 2 : 0,
                                        .partial_out = partial_out.get(), .partial_max_sum = partial_sum.get(),
                                        .tickets = tickets.get(), .num_heads = heads_.q, .num_kv_heads = heads_.kv,
                                        .head_dim = heads_.dim, .softmax_scale = scale});
    prefill_attention(context_, dtype_, {.qkv = device_qkv.get(), .y = y.get(), .k_cache = keys_->get(),
                                         .v_cache = values_->get(), .step = arrays,
                                         .num_tiles = static_cast<int>(tiles.size()), .num_heads = heads_.q,
                                         .num_kv_heads = heads_.kv, .head_dim = heads_.dim, .softmax_scale = scale});
    for (uint32_t ticket : tickets.host()) EXPECT_EQ(ticket, 0U);
    return y.host();
  }
  // Fills the cache of a sequence up to `end` tokens.
  void fill(int sequence, int end) {
    for (int begin = 0; begin < end; begin += 128) (void)step({{sequence, begin, std::min(end, begin + 128)}});
  }

  std::vector<double> reference(const std::vector<Query>& queries) const {
    std::vector<double> y;
    const int half = heads_.dim / 2;
    for (const Query& query : queries) {
      // Rotated q and k rounded to the cache's type, as any 16-bit cache holds them.
      const auto& source = source_[static_cast<size_t>(query.sequence)];
      const auto rotated = [&](int t, int head, int d) {
        const auto value = [&](int i) { return static_cast<double>(from_bits(source[t * row_ + static_cast<size_t>(head) * heads_.dim + i], dtype_)); };
        const double angle = static_cast<double>(static_cast<float>(t) * inv_freq_[d % half]);
        const double a = value(d % half), b = value(d % half + half);
        const double r = d < half ? a * std::cos(angle) - b * std::sin(angle) : b * std::cos(angle) + a * std::sin(angle);
        return static_cast<double>(from_bits(to_bits(static_cast<float>(r), dtype_), dtype_));
      };
      std::map<std::pair<int, int>, std::vector<double>> key_rows;
      for (int t = query.begin; t < query.end; ++t) {
        for (int h = 0; h < heads_.q; ++h) {
          const int kv = h / (heads_.q / heads_.kv);
          std::vector<double> q(heads_.dim), scores(t + 1), out(heads_.dim, 0.0);
          for (int d = 0; d < heads_.dim; ++d) q[d] = rotated(t, h, d);
          double largest = -1e300;
          for (int j = 0; j <= t; ++j) {
            auto& key = key_rows[{j, kv}];
            if (key.empty()) {
              for (int d = 0; d < heads_.dim; ++d) key.push_back(rotated(j, heads_.q + kv, d));
            }
            double dot = 0;
            for (int d = 0; d < heads_.dim; ++d) dot += q[d] * key[d];
            scores[j] = dot / std::sqrt(static_cast<double>(heads_.dim));
            largest = std::max(largest, scores[j]);
          }
          double sum = 0;
          for (int j = 0; j <= t; ++j) {
            const double p = std::exp(scores[j] - largest);
            sum += p;
            const size_t base = j * row_ + static_cast<size_t>(heads_.q + heads_.kv + kv) * heads_.dim;
            for (int d = 0; d < heads_.dim; ++d) out[d] += p * from_bits(source[base + d], dtype_);
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
  std::vector<int> lengths_;
  Random random_;
  size_t row_;
  LaunchContext context_;
  int num_blocks_ = 0;
  int max_blocks_ = 0;
  std::vector<std::vector<int>> tables_;
  std::vector<std::vector<uint16_t>> source_;  // [length, (Hq + 2 Hkv) * D]
  std::vector<float> inv_freq_;
  std::unique_ptr<DeviceArray<uint16_t>> keys_, values_;
};

const std::vector<std::pair<Heads, DType>> kHeads = {
    {{4, 2, 64}, DType::bf16}, {{5, 1, 128}, DType::bf16}, {{6, 2, 80}, DType::f16}, {{3, 3, 96}, DType::bf16},
    {{18, 1, 64}, DType::f16}, {{16, 2, 128}, DType::f16}};
// Probabilities and V are 16-bit: twice the rounding of an output.
double attention_tolerance(DType dtype) { return 2 * tolerance_rounded(dtype); }

TEST("decode attention equals the float64 reference at block and split edges") {
  for (const auto& [heads, dtype] : kHeads) {
    const std::vector<int> lengths = {1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600};
    Attention attention(heads, dtype, lengths, 3);
    std::vector<Attention::Query> queries;
    for (int s = 0; s < static_cast<int>(lengths.size()); ++s) {
      attention.fill(s, lengths[s] - 1);
      queries.push_back({s, lengths[s] - 1, lengths[s]});
    }
    const double error = relative_error(to_floats(attention.step(queries), dtype), attention.reference(queries));
    std::printf("    heads %d/%d x %d: %.2e\n", heads.q, heads.kv, heads.dim, error);
    EXPECT(error < attention_tolerance(dtype));
  }
}

TEST("prefill attention equals the float64 reference, whole and in chunks") {
  for (const auto& [heads, dtype] : kHeads) {
    Attention attention(heads, dtype, {2, 64, 65, 200}, 4);
    const std::vector<Attention::Query> whole = {{0, 0, 2}, {1, 0, 64}, {2, 0, 65}, {3, 0, 200}};
    const std::vector<uint16_t> bits = attention.step(whole);
    const double error = relative_error(to_floats(bits, dtype), attention.reference(whole));
    std::printf("    heads %d/%d x %d: %.2e\n", heads.q, heads.kv, heads.dim, error);
    EXPECT(error < attention_tolerance(dtype));
    // The same rows computed in two chunks are the same bits, wherever the cut lies.
    for (const int cut : {64, 72, 77, 80, 128}) {
      std::vector<uint16_t> pieces = attention.step({{3, 0, cut}});
      const std::vector<uint16_t> second = attention.step({{3, cut, 200}});
      pieces.insert(pieces.end(), second.begin(), second.end());
      const size_t skip = bits.size() - pieces.size();
      size_t different = 0;
      for (size_t i = 0; i < pieces.size(); ++i) {
        if (pieces[i] == bits[skip + i]) continue;
        if (different++ > 1) continue;
        std::printf("    cut %d, row %zu column %zu: %.9g in chunks, %.9g whole\n", cut, i / (heads.q * heads.dim),
                    i % (heads.q * heads.dim), from_bits(pieces[i], dtype), from_bits(bits[skip + i], dtype));
      }
      EXPECT_EQ(different, 0U);
    }
  }
}

TEST("a sequence's attention is the same bits alone, in a mixed batch and in every run") {
  for (const auto& [heads, dtype] : kHeads) {
    const std::vector<int> lengths = {700, 33, 129, 300};
    Attention attention(heads, dtype, lengths, 5);
    for (int s = 0; s < 4; ++s) attention.fill(s, lengths[s] - 1);
    const Attention::Query wanted{0, 699, 700};
    const std::vector<uint16_t> alone = attention.step({wanted});
    const auto in_batch = [&](const std::vector<Attention::Query>& queries, size_t row) {
      const std::vector<uint16_t> all = attention.step(queries);
      return std::vector<uint16_t>(all.begin() + static_cast<int64_t>(row * alone.size()), all.begin() + static_cast<int64_t>((row + 1) * alone.size()));
    };
    EXPECT(attention.step({wanted}) == alone);
    EXPECT(in_batch({{1, 32, 33}, wanted, {3, 299, 300}}, 1) == alone);
    EXPECT(in_batch({{2, 0, 129}, {1, 10, 33}, wanted}, 129 + 23) == alone);
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

}  // namespace

int main() {
  require_device();
  return turbomind::test::run_all();
}
