// Packing, screening and rescoring of the head; see the header. Runs on the engine thread and its
// team.
#include "backend/cpu/head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "backend/cpu/linear_dense.h"
#include "backend/cpu/linear_u4.h"
#include "base/error.h"

namespace turbomind::cpu {
namespace {

constexpr int64_t kRows = 16;                     // vocabulary rows a block
constexpr int64_t kScreenedRows = 16;             // rows of x screened at once
constexpr int64_t kSmallHead = int64_t{4} << 20;  // weights below which all rows are scored exactly
constexpr int64_t kMostFeatures = 65536;          // the bound and int32 sums hold up to here

// k-th largest of values; reorders them.
float kth_largest(float* values, int64_t count, int64_t k) {
  if (k == 1) return *std::max_element(values, values + count);
  std::nth_element(values, values + k - 1, values + count, std::greater<float>());
  return values[k - 1];
}

}  // namespace

// Room for the rows a task looks at; on the stack but for rows of more than 32 thousand halves.
class Head::RowBuffer {
 public:
  uint8_t* room(size_t bytes) {
    if (bytes <= sizeof(stack_)) return stack_;
    if (heap_.size() < bytes) heap_.resize(bytes);
    return heap_.data();
  }

 private:
  alignas(64) uint8_t stack_[64 << 10];
  std::vector<uint8_t> heap_;
};

struct Head::Scratch {
  int8_t* hi;  // [rows][depth]
  int8_t* lo;
  int32_t* start_hi;  // [rows] -32 * sum of hi: takes the weights' offset back
  int32_t* start_lo;
  float* a;  // [rows] scale of x
  float* p;  // [rows] P and Q of the bound
  float* q;
  float* best;       // [rows][blocks] greatest lower bound of each block
  int32_t* best_at;  // [rows][blocks] the vocabulary row that has it
  float* sorted;     // [blocks]
  int64_t rows;
};

namespace {

void check_head(const LinearSource& source) {
  if (source.parts.size() != 1 || source.kind() != WeightKind::dense) {
    throw Error(ErrorCode::unsupported_quantization,
                format("%s: the head must be one dense matrix", source.name.c_str()));
  }
  check_dense_part(source, source.parts[0]);
}

size_t scratch_size(int64_t rows, int64_t depth, int64_t blocks) {
  return static_cast<size_t>(rows) *
             (static_cast<size_t>(depth) * 2 + 64 + static_cast<size_t>(blocks) * 8) +
         static_cast<size_t>(blocks) * sizeof(float) + 64;
}

}  // namespace

size_t Head::packed_bytes(const LinearSource& source) {
  check_head(source);
  const LinearPart& part = source.parts[0];
  const int64_t v = part.out_features;
  const int64_t h = source.in_features;
  const size_t bias = bias_bytes(source, ceil_div<int64_t>(v, kBlockColumns));
  if (v * h < kSmallHead) return part.weight.bytes() + bias;
  if (h > kMostFeatures || bias > 0) return bias;  // rows stay in the file, nothing is screened
  const auto blocks = static_cast<size_t>(ceil_div(v, kRows));
  const auto lines = static_cast<size_t>(round_up<int64_t>(h, kHeadDepth) / kHeadDepth);
  return blocks * (lines * kHeadLineBytes + 3 * kRows * sizeof(float));
}

size_t Head::scratch_bound(int64_t rows, int64_t vocab, int64_t hidden) {
  return scratch_size(rows, round_up<int64_t>(hidden, kHeadDepth), ceil_div(vocab, kRows));
}

Head::Head(const LinearSource& source, Isa isa, ThreadPool& pool) : kernels_(kernels_for(isa)) {
  check_head(source);
  const LinearPart& part = source.parts[0];
  v_ = part.out_features;
  h_ = source.in_features;
  depth_ = round_up<int64_t>(h_, kHeadDepth);
  block_bytes_ = depth_ / kHeadDepth * kHeadLineBytes;
  type_ = dense_type(part.weight.dtype);
  row_bytes_ = static_cast<size_t>(h_) * dtype_bytes(part.weight.dtype);
  bias_ = pack_bias(source, ceil_div<int64_t>(v_, kBlockColumns));
  if (v_ * h_ < kSmallHead) {
    const uint8_t* table = part.weight.as<uint8_t>();
    small_.assign(table, table + part.weight.bytes());
    return;
  }
  file_ = FileRows(part.weight.data, part.weight.bytes());
  if (h_ > kMostFeatures || !bias_.empty()) return;
  blocks_ = ceil_div(v_, kRows);
  memory_ = MappedMemory(static_cast<size_t>(blocks_ * block_bytes_));
  const size_t padded = static_cast<size_t>(blocks_ * kRows);
  scale_.assign(padded, 0.0F);
  residual_.assign(padded, 0.0F);
  norm_.assign(padded, 0.0F);
  const uint8_t* table = part.weight.as<uint8_t>();
  const SourcePages pages({{table, part.weight.bytes()}});
  pool.parallel_for(blocks_, 16, [&](int64_t begin, int64_t end) {
    const size_t bytes =
        static_cast<size_t>(std::min(v_, end * kRows) - begin * kRows) * row_bytes_;
    const uint8_t* data = table + static_cast<size_t>(begin * kRows) * row_bytes_;
    pages.will_read(data, bytes);
    for (int64_t b = begin; b < end; ++b)
      pack_block(b, table + static_cast<size_t>(b * kRows) * row_bytes_);
    pages.done_with(data, bytes);
  });
}

// Sixteen rows to 6 bits. Padding rows keep scale 0 and are never looked at.
void Head::pack_block(int64_t block, const uint8_t* rows) {
  std::vector<uint8_t> bytes(static_cast<size_t>(kRows * depth_), 32);
  const int64_t count = std::min(kRows, v_ - block * kRows);
  for (int64_t n = 0; n < count; ++n) {
    const uint8_t* row = rows + static_cast<size_t>(n) * row_bytes_;
    const HeadRow packed = kernels_.pack_head_row(type_, row, h_, bytes.data() + n * 4);
    const size_t at = static_cast<size_t>(block * kRows + n);
    scale_[at] = packed.scale;
    residual_[at] = packed.residual;
    norm_[at] = packed.norm;
  }
  // Four lines of bytes become three of six bits and a pair of the fourth's.
  uint8_t* out = memory_.data() + static_cast<size_t>(block * block_bytes_);
  for (const uint8_t* in = bytes.data(); in != bytes.data() + bytes.size();
       in += 256, out += kHeadLineBytes) {
    for (int j = 0; j < 64; ++j) {
      const int last = in[192 + j];
      out[j] = static_cast<uint8_t>(in[j] | (last & 3) << 6);
      out[64 + j] = static_cast<uint8_t>(in[64 + j] | (last >> 2 & 3) << 6);
      out[128 + j] = static_cast<uint8_t>(in[128 + j] | (last >> 4 & 3) << 6);
    }
  }
}

size_t Head::bytes() const {
  return memory_.bytes() + small_.size() + (scale_.size() * 3 + bias_.size()) * sizeof(float);
}

size_t Head::scratch_bytes(int64_t rows) const { return scratch_size(rows, depth_, blocks_); }

Head::Scratch Head::lay_out(void* scratch, int64_t rows) const {
  Scratch s;
  s.rows = rows;
  s.hi = static_cast<int8_t*>(scratch);
  s.lo = s.hi + rows * depth_;
  s.start_hi = reinterpret_cast<int32_t*>(s.lo + rows * depth_);
  s.start_lo = s.start_hi + rows;
  s.a = reinterpret_cast<float*>(s.start_lo + rows);
  s.p = s.a + rows;
  s.q = s.p + rows;
  s.best = s.q + rows;
  s.best_at = reinterpret_cast<int32_t*>(s.best + rows * blocks_);
  s.sorted = reinterpret_cast<float*>(s.best_at + rows * blocks_);
  return s;
}

// Row `row` of x to 16-bit fixed point with one scale, and its constants of the bound.
void Head::quantize(const float* x, const Scratch& s, int64_t row) const {
  float top = 0.0F;
  double square = 0;
  for (int64_t i = 0; i < h_; ++i) {
    top = std::max(top, std::fabs(x[i]));
    square += static_cast<double>(x[i]) * x[i];
  }
  const float inverse = top > 1e-30F ? 32639.0F / top : 0.0F;
  int8_t* hi = s.hi + row * depth_;
  int8_t* lo = s.lo + row * depth_;
  std::memset(hi, 0, static_cast<size_t>(depth_));
  std::memset(lo, 0, static_cast<size_t>(depth_));
  int32_t sum_hi = 0, sum_lo = 0;
  for (int64_t i = 0; i < h_; ++i) {
    const float scaled = std::nearbyint(x[i] * inverse);
    const int32_t v = std::fabs(scaled) <= 32639.0F ? static_cast<int32_t>(scaled) : 0;
    lo[i] = static_cast<int8_t>(v & 255);
    hi[i] = static_cast<int8_t>((v - lo[i]) / 256);
    sum_hi += hi[i];
    sum_lo += lo[i];
  }
  s.start_hi[row] = -32 * sum_hi;
  s.start_lo[row] = -32 * sum_lo;
  s.a[row] = top / 32639.0F;
  const double norm = std::sqrt(square);
  // Below the cut-off v is zero and d is x itself.
  const double d = inverse > 0 ? 0.51 * s.a[row] * std::sqrt(static_cast<double>(h_)) : norm;
  const double kappa = (static_cast<double>(h_) / 64 + 40) * 0x1p-24;
  s.p[row] = static_cast<float>(1.001 * (norm + d));
  s.q[row] = static_cast<float>(1.001 * (d + kappa * norm));
}

// upper[row][n] = screened score plus bound, s.best = each block's greatest lower bound.
void Head::screen(const Scratch& s, float* upper, ThreadPool& pool) const {
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / block_bytes_);
  pool.parallel_for(blocks_, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float out[kScreenedRows * kRows];
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* block = memory_.data() + static_cast<size_t>(b * block_bytes_);
      const int64_t first = b * kRows;
      const int64_t count = std::min(kRows, v_ - first);
      for (int64_t row = 0; row < s.rows; row += kScreenedRows) {
        const int rows = static_cast<int>(std::min(kScreenedRows, s.rows - row));
        kernels_.screen(block, depth_, s.hi + row * depth_, s.lo + row * depth_, depth_,
                        s.start_hi + row, s.start_lo + row, rows, out);
        for (int r = 0; r < rows; ++r) {
          const float a = s.a[row + r], p = s.p[row + r], q = s.q[row + r];
          float* to = upper + (row + r) * v_ + first;
          float best = -std::numeric_limits<float>::infinity();
          int64_t best_at = first;
          for (int64_t n = 0; n < count; ++n) {
            const float score = out[r * kRows + n] * (scale_[first + n] * a);
            const float bound = residual_[first + n] * p + norm_[first + n] * q;
            to[n] = score + bound;
            if (score - bound > best) {
              best = score - bound;
              best_at = first + n;
            }
          }
          s.best[(row + r) * blocks_ + b] = best;
          s.best_at[(row + r) * blocks_ + b] = static_cast<int32_t>(best_at);
        }
      }
    }
  });
}

// Rows [n, n + count): where they lie, or a copy in `buffer`.
const uint8_t* Head::table_rows(int64_t n, int64_t count, RowBuffer& buffer) const {
  const size_t offset = static_cast<size_t>(n) * row_bytes_;
  const size_t bytes = static_cast<size_t>(count) * row_bytes_;
  if (!small_.empty()) return small_.data() + offset;
  uint8_t* to = buffer.room(bytes);
  if (!file_.read(offset, bytes, to)) unreadable_ = true;
  return to;
}

float Head::exact(int64_t n, const uint8_t* row, const float* x) const {
  const float score = kernels_.dot(type_, row, x, h_);
  return bias_.empty() ? score : score + bias_[static_cast<size_t>(n)];
}

void Head::check_readable() const {
  if (unreadable_.exchange(false)) throw file_changed_error("the head");
}

// At most the k-th best exact logit of row `row`: the least exact one of k entries, those that lead
// the k blocks with the greatest lower bounds. Far sharper than the bounds themselves.
float Head::least_of_best(const Scratch& s, int64_t row, int k, const float* x) const {
  const float* best = s.best + row * blocks_;
  std::copy_n(best, blocks_, s.sorted);
  const float kth = kth_largest(s.sorted, blocks_, k);
  float least = std::numeric_limits<float>::infinity();
  RowBuffer buffer;
  for (int64_t b = 0, taken = 0; b < blocks_ && taken < k; ++b) {
    if (!(best[b] >= kth)) continue;
    const int64_t n = s.best_at[row * blocks_ + b];
    const float score = exact(n, table_rows(n, 1, buffer), x);
    if (std::isnan(score)) return -std::numeric_limits<float>::infinity();
    least = std::min(least, score);
    ++taken;
  }
  return least;
}

// Entries of [begin, end) that can matter get exact scores.
void Head::rescore(const float* x, float threshold, float* scores, int64_t begin,
                   int64_t end) const {
  RowBuffer buffer;
  for (int64_t n = begin; n < end; ++n) {
    if (scores[n] < threshold) {
      scores[n] = -std::numeric_limits<float>::infinity();
    } else {  // a NaN bound (NaN in x) too: the exact score then says NaN
      scores[n] = exact(n, table_rows(n, 1, buffer), x);
    }
  }
}

void Head::logits(const float* x, int64_t rows, float* y, void*, ThreadPool& pool) const {
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / static_cast<int64_t>(row_bytes_));
  pool.parallel_for(v_, grain, [&](int64_t begin, int64_t end) {
    RowBuffer buffer;
    const uint8_t* table = table_rows(begin, end - begin, buffer);
    for (int64_t n = begin; n < end; ++n) {
      const uint8_t* w = table + static_cast<size_t>(n - begin) * row_bytes_;
      for (int64_t row = 0; row < rows; ++row) y[row * v_ + n] = exact(n, w, x + row * h_);
    }
  });
  check_readable();
}

void Head::best_logits(const float* x, int64_t rows, int k, float margin, float* scores,
                       void* scratch, ThreadPool& pool) const {
  if (rows <= 0) return;
  // Few blocks: their maxima cannot name k entries sharply.
  if (blocks_ == 0 || k > blocks_ / 4) return logits(x, rows, scores, scratch, pool);
  const Scratch s = lay_out(scratch, rows);
  for (int64_t row = 0; row < rows; ++row) quantize(x + row * h_, s, row);
  screen(s, scores, pool);
  for (int64_t row = 0; row < rows; ++row) {
    s.a[row] = least_of_best(s, row, std::max(k, 1), x + row * h_) - margin;
  }
  constexpr int64_t kChunk = 4096;
  const int64_t chunks = ceil_div(v_, kChunk);
  pool.parallel_for(rows * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / chunks, from = task % chunks * kChunk;
      rescore(x + row * h_, s.a[row], scores + row * v_, from, std::min(v_, from + kChunk));
    }
  });
  check_readable();
}

std::unique_ptr<PackedHead> pack_head(const LinearSource& source, Isa isa, ThreadPool& pool) {
  return std::make_unique<Head>(source, isa, pool);
}

}  // namespace turbomind::cpu
