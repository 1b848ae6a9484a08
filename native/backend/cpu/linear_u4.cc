// The plan of a 4-bit linear layer; see the header. Runs on the engine thread and its team.
#include "backend/cpu/linear_u4.h"

#include <algorithm>

#include "backend/cpu/kernels/float_formats.h"
#include "backend/cpu/linear_u4_pack.h"
#include "base/error.h"

namespace turbomind::cpu {
namespace {

// Up to here rows go through the vector dot products, which read weights once per four rows; above
// it the matrix unit is faster even with most of its rows empty (measured).
constexpr int64_t kFewRows = 4;

// Row blocks whose sums (2 kB each) and fixed-point rows stay in the caches of a core while one
// block of weights passes by.
int64_t row_blocks_per_task(int64_t k) {
  constexpr int64_t kActivationBytes = 1200 << 10;
  constexpr int64_t kMost = 8;
  return std::clamp(kActivationBytes / (2 * kTileRows * k), int64_t{1}, kMost);
}

size_t scratch_size(int64_t rows, int64_t k, int64_t groups) {
  // A tile of the last row block may read past it; see u4_tiles.
  return round_up(static_cast<size_t>(rows * k) * 2 + static_cast<size_t>(rows * groups) * 12 +
                      kTileRows * (64 * 2 + sizeof(float)),
                  size_t{64});
}

// Blocks cut into runs that shrink: each thread first takes a quarter of its fair share of what is
// left, twice halved, so that most weights are read in long runs (what is prefetched past the end
// of a run is wasted) and the last runs even out who was slower.
class ShrinkingRuns {
 public:
  ShrinkingRuns(int64_t blocks, int threads)
      : blocks_(blocks),
        threads_(threads == 1 ? 1 : threads),
        levels_(threads == 1 ? 1 : kLevels) {}
  int64_t count() const { return levels_ * threads_; }
  int64_t begin(int64_t run) const {
    const int64_t level = run / threads_;
    if (level >= levels_) return blocks_;
    // In units of blocks / 2^level: all levels before, then this one's runs. The last takes the
    // rest.
    const int64_t unit = int64_t{1} << level;
    const int64_t share = level + 1 < levels_ ? 2 * threads_ : threads_;
    return blocks_ - blocks_ / unit + (run % threads_) * (blocks_ / unit) / share;
  }

 private:
  static constexpr int64_t kLevels = 4;
  int64_t blocks_, threads_, levels_;
};

}  // namespace

int64_t packed_blocks(const LinearSource& source) {
  if (source.order == PartOrder::gate_up) {
    return ceil_div<int64_t>(source.parts.at(0).out_features, kBlockColumns / 2);
  }
  return ceil_div<int64_t>(source.out_features(), kBlockColumns);
}

SourceColumn source_column(const LinearSource& source, int64_t packed_column) {
  if (source.order == PartOrder::gate_up) {  // 16 gates, 16 ups, 16 gates, …
    const int64_t column = packed_column / kBlockColumns * 16 + packed_column % 16;
    if (column >= source.parts[0].out_features) return {};
    return {packed_column % kBlockColumns < 16 ? 0 : 1, column};
  }
  for (size_t part = 0; part < source.parts.size(); ++part) {
    const int64_t n = source.parts[part].out_features;
    if (packed_column < n) return {static_cast<int>(part), packed_column};
    packed_column -= n;
  }
  return {};
}

size_t bias_bytes(const LinearSource& source, int64_t blocks) {
  const bool any = std::any_of(source.parts.begin(), source.parts.end(),
                               [](const LinearPart& part) { return static_cast<bool>(part.bias); });
  return any ? static_cast<size_t>(blocks) * kBlockColumns * sizeof(float) : 0;
}

std::vector<float> pack_bias(const LinearSource& source, int64_t blocks) {
  bool any = false;
  for (const LinearPart& part : source.parts) {
    if (!part.bias) continue;
    any = true;
    const DType type = part.bias.dtype;
    const bool is_float = type == DType::f32 || type == DType::f16 || type == DType::bf16;
    if (part.bias.elements() != part.out_features || !is_float) {
      throw Error(
          ErrorCode::tensor_mismatch,
          format("%s: bias has %lld values of type %s, expected %lld floats", source.name.c_str(),
                 static_cast<long long>(part.bias.elements()), std::string(to_string(type)).c_str(),
                 static_cast<long long>(part.out_features)));
    }
  }
  std::vector<float> bias(any ? static_cast<size_t>(blocks) * kBlockColumns : 0, 0.0F);
  for (size_t i = 0; i < bias.size(); ++i) {
    const SourceColumn from = source_column(source, static_cast<int64_t>(i));
    if (from.part < 0 || !source.parts[from.part].bias) continue;
    const ConstTensorView& view = source.parts[from.part].bias;
    if (view.dtype == DType::f32) bias[i] = view.as<float>()[from.column];
    if (view.dtype == DType::f16) bias[i] = f16_to_f32(view.as<uint16_t>()[from.column]);
    if (view.dtype == DType::bf16) bias[i] = bf16_to_f32(view.as<uint16_t>()[from.column]);
  }
  return bias;
}

void finish_block(const Kernels& kernels, const LinearCall& call, const std::vector<float>& bias,
                  int64_t out_columns, int64_t block, int64_t row, int64_t rows, const float* acc) {
  const int64_t width = call.epilogue == Epilogue::silu_mul ? kBlockColumns / 2 : kBlockColumns;
  const int64_t column = block * width;
  Finish finish;
  finish.acc = acc;
  finish.bias = bias.empty() ? nullptr : bias.data() + block * kBlockColumns;
  finish.scale = call.scale != nullptr ? call.scale + column : nullptr;
  finish.epilogue = call.epilogue;
  finish.y = call.y + row * out_columns + column;
  finish.y_stride = out_columns;
  finish.rows = rows;
  finish.valid = static_cast<int>(std::min(width, out_columns - column));
  kernels.finish(finish);
}

LinearU4::LinearU4(const LinearSource& source, Isa isa, ThreadPool& pool)
    : kernels_(kernels_for(isa)), order_(source.order) {
  check_u4_source(source);
  shape_ = u4_shape(source);
  columns_ = source.out_features();
  out_columns_ = order_ == PartOrder::gate_up ? columns_ / 2 : columns_;
  blocks_ = packed_blocks(source);
  bias_ = pack_bias(source, blocks_);
  memory_ = pack_u4(source, shape_, pool);
}

// Fixed-point rows in scratch: all planes, then scales and the two sums.
struct LinearU4::RowBlocks {
  int8_t* planes;
  float* scale;
  int32_t* minus_hi;
  int32_t* minus_lo;
  int64_t rows;
  int64_t k, groups;

  int64_t count() const { return ceil_div<int64_t>(rows, kTileRows); }
  U4Rows at(int64_t i) const {
    const int64_t entry = i * kTileRows * groups;
    return {planes + i * kTileRows * k * 2, scale + entry, minus_hi + entry, minus_lo + entry,
            static_cast<int>(std::min<int64_t>(kTileRows, rows - i * kTileRows))};
  }
};

size_t LinearU4::packed_bytes(const LinearSource& source) {
  check_u4_source(source);
  const int64_t blocks = packed_blocks(source);
  return static_cast<size_t>(blocks) * u4_shape(source).block_bytes + bias_bytes(source, blocks);
}

size_t LinearU4::scratch_bytes(int64_t rows) const {
  return scratch_size(rows, shape_.k, shape_.groups);
}

size_t LinearU4::scratch_bound(int64_t rows, int64_t k) {
  constexpr int64_t kLeastGroup = 32;
  return scratch_size(rows, k, ceil_div(k, kLeastGroup));
}

LinearU4::RowBlocks LinearU4::lay_out(void* scratch, int64_t rows) const {
  int8_t* planes = static_cast<int8_t*>(scratch);
  float* scale = reinterpret_cast<float*>(planes + rows * shape_.k * 2);
  // The last row block's missing rows find zeros for scales: integers read as floats are denormal.
  std::fill_n(scale + rows * shape_.groups, kTileRows, 0.0F);
  int32_t* minus_hi = reinterpret_cast<int32_t*>(scale + rows * shape_.groups + kTileRows);
  return {planes, scale, minus_hi, minus_hi + rows * shape_.groups, rows, shape_.k, shape_.groups};
}

void LinearU4::quantize(const LinearCall& call, const RowBlocks& x, ThreadPool& pool) const {
  RowNorm norm;
  if (call.norm != nullptr) norm = row_norm_of(*call.norm, shape_.k);
  // A row costs well under a microsecond per thousand values: few rows are not worth a job.
  const int64_t grain = std::max<int64_t>(1, 16384 / shape_.k);
  pool.parallel_for(call.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernels_.u4_quantize(shape_, call.norm != nullptr ? &norm : nullptr, call.x + row * shape_.k,
                           x.at(row / kTileRows), static_cast<int>(row % kTileRows));
    }
  });
}

void LinearU4::run(const LinearCall& call, void* scratch, ThreadPool& pool) const {
  TM_CHECK((call.epilogue == Epilogue::silu_mul) == (order_ == PartOrder::gate_up),
           "silu_mul needs a weight packed as gate_up, and only that");
  if (call.rows <= 0) return;
  const RowBlocks x = lay_out(scratch, call.rows);
  quantize(call, x, pool);
  if (kernels_.u4_tiles != nullptr && call.rows > kFewRows) {
    run_tiles(call, x, pool);
  } else {
    run_few_rows(call, x, pool);
  }
}

void LinearU4::run_few_rows(const LinearCall& call, const RowBlocks& x, ThreadPool& pool) const {
  const ShrinkingRuns runs(blocks_, pool.size());
  pool.parallel_for(runs.count(), 1, [&](int64_t first, int64_t last) {
    alignas(64) float acc[kTileRows * kBlockColumns];
    for (int64_t b = runs.begin(first); b < runs.begin(last); ++b) {
      for (int64_t i = 0; i < x.count(); ++i) {
        const U4Rows rows = x.at(i);
        kernels_.u4_rows(shape_, block(b), rows, 0, rows.rows, acc);
        finish_block(kernels_, call, bias_, out_columns_, b, i * kTileRows, rows.rows, acc);
      }
    }
  });
}

void LinearU4::run_tiles(const LinearCall& call, const RowBlocks& x, ThreadPool& pool) const {
  constexpr int64_t kMost = 8;
  const int64_t strips = ceil_div(x.count(), row_blocks_per_task(shape_.k));
  const int64_t per_task = ceil_div(x.count(), strips);
  const int64_t grain =
      x.count() > 1 ? 1
                    : std::max<int64_t>(1, (64 << 10) / static_cast<int64_t>(shape_.block_bytes));
  // Strip-major: the rows of a strip stay in cache while all blocks of weights pass.
  pool.parallel_for(strips * blocks_, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float acc[kMost * kTileRows * kBlockColumns];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / blocks_ * per_task;
      const int64_t b = task % blocks_;
      const int count = static_cast<int>(std::min(per_task, x.count() - first));
      U4Rows rows[kMost];
      for (int i = 0; i < count; ++i) rows[i] = x.at(first + i);
      kernels_.u4_tiles(shape_, block(b), rows, count, acc);
      const int64_t row = first * kTileRows;
      finish_block(kernels_, call, bias_, out_columns_, b, row,
                   std::min<int64_t>(count * kTileRows, call.rows - row), acc);
    }
  });
}

}  // namespace turbomind::cpu
