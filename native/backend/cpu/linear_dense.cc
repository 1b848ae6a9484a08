// Packing and plan of a dense linear layer; see the header. Runs on the engine thread and its team.
#include "backend/cpu/linear_dense.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu/kernels/float_formats.h"
#include "backend/cpu/linear_u4.h"
#include "base/error.h"

namespace turbomind::cpu {
namespace {

constexpr int64_t kDepth = 32;  // k of one bf16 tile

float read_weight(const ConstTensorView& view, int64_t at) {
  if (view.dtype == DType::f16) return f16_to_f32(view.as<uint16_t>()[at]);
  if (view.dtype == DType::bf16) return bf16_to_f32(view.as<uint16_t>()[at]);
  return view.as<float>()[at];
}

// The row of K weights behind packed column `n`; null for padding.
struct Row {
  const ConstTensorView* view = nullptr;
  int64_t begin = 0;
};
Row source_row(const LinearSource& source, int64_t n) {
  const SourceColumn from = source_column(source, n);
  if (from.part < 0) return {};
  return {&source.parts[from.part].weight, from.column * source.in_features};
}

// [k / 32][half][16 pairs of k][16 columns][2]; memory is zeroed, so padding needs no writes.
void pack_tile_block(const LinearSource& source, int64_t block, uint16_t* out) {
  const int64_t k = source.in_features;
  for (int n = 0; n < kBlockColumns; ++n) {
    const Row row = source_row(source, block * kBlockColumns + n);
    if (row.view == nullptr) continue;
    const uint16_t* from = row.view->as<uint16_t>() + row.begin;
    uint16_t* to = out + n / 16 * 512 + n % 16 * 2;
    for (int64_t i = 0; i < k; i += 2) {
      uint16_t* pair = to + i / kDepth * 1024 + i % kDepth / 2 * 32;
      pair[0] = from[i];
      if (i + 1 < k) pair[1] = from[i + 1];
    }
  }
}

// [k][32].
void pack_fma_block(const LinearSource& source, int64_t block, DenseType type, void* out) {
  const int64_t k = source.in_features;
  for (int n = 0; n < kBlockColumns; ++n) {
    const Row row = source_row(source, block * kBlockColumns + n);
    if (row.view == nullptr) continue;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t to = i * kBlockColumns + n;
      if (type == DenseType::f32) {
        static_cast<float*>(out)[to] = read_weight(*row.view, row.begin + i);
      } else {
        static_cast<uint16_t*>(out)[to] = row.view->as<uint16_t>()[row.begin + i];
      }
    }
  }
}

// Rows a task keeps: its sums (128 bytes a row) stay in the first cache.
constexpr int64_t kTaskRows = 128;
constexpr int64_t kTaskBlocks = 4;  // blocks of columns a tile task takes together

int64_t block_grain(int64_t row_tasks, size_t block_bytes) {
  return row_tasks > 1 ? 1 : std::max<int64_t>(1, (32 << 10) / static_cast<int64_t>(block_bytes));
}

}  // namespace

DenseType dense_type(DType dtype) {
  if (dtype == DType::f16) return DenseType::f16;
  return dtype == DType::bf16 ? DenseType::bf16 : DenseType::f32;
}

void check_dense_part(const LinearSource& source, const LinearPart& part) {
  const ConstTensorView& w = part.weight;
  const bool is_float = w.dtype == DType::f32 || w.dtype == DType::f16 || w.dtype == DType::bf16;
  const bool shape = w.data != nullptr && w.rank >= 2 && part.out_features > 0 &&
                     w.shape[0] == part.out_features && w.row_elements() == source.in_features;
  if (is_float && shape) return;
  throw Error(
      ErrorCode::tensor_mismatch,
      format("%s: weight is [%lld, %lld] of type %s, expected [%lld, %lld] of f32, f16 or bf16",
             source.name.c_str(), static_cast<long long>(w.dim(0)),
             static_cast<long long>(w.row_elements()), std::string(to_string(w.dtype)).c_str(),
             static_cast<long long>(part.out_features),
             static_cast<long long>(source.in_features)));
}

namespace {

// How a dense layer is packed; decided by its source and the machine alone.
struct DenseShape {
  DenseType type;
  bool tiles;
  size_t block_bytes;
};

DenseShape dense_shape(const LinearSource& source, const Kernels& kernels) {
  bool same = true;
  for (const LinearPart& part : source.parts) {
    check_dense_part(source, part);
    same = same && part.weight.dtype == source.parts[0].weight.dtype;
  }
  DenseShape shape{};
  shape.type = same ? dense_type(source.parts[0].weight.dtype) : DenseType::f32;
  shape.tiles = shape.type == DenseType::bf16 && kernels.bf16_tiles != nullptr;
  const int64_t k = source.in_features;
  const int64_t depth = shape.tiles ? round_up(k, kDepth) : k;
  shape.block_bytes =
      static_cast<size_t>(depth) * kBlockColumns * (shape.type == DenseType::f32 ? 4 : 2);
  return shape;
}

}  // namespace

size_t LinearDense::packed_bytes(const LinearSource& source, Isa isa) {
  const int64_t blocks = packed_blocks(source);
  return static_cast<size_t>(blocks) * dense_shape(source, kernels_for(isa)).block_bytes +
         bias_bytes(source, blocks);
}

size_t LinearDense::scratch_bound(int64_t rows, int64_t k) {
  return static_cast<size_t>(rows * round_up(k, kDepth)) * 4;
}

LinearDense::LinearDense(const LinearSource& source, Isa isa, ThreadPool& pool)
    : kernels_(kernels_for(isa)), k_(source.in_features), order_(source.order) {
  std::vector<std::pair<const void*, size_t>> ranges;
  for (const LinearPart& part : source.parts) {
    ranges.emplace_back(part.weight.data, part.weight.bytes());
  }
  const DenseShape shape = dense_shape(source, kernels_);
  type_ = shape.type;
  family_tiles_ = shape.tiles;
  columns_ = source.out_features();
  out_columns_ = order_ == PartOrder::gate_up ? columns_ / 2 : columns_;
  blocks_ = packed_blocks(source);
  bias_ = pack_bias(source, blocks_);
  block_bytes_ = shape.block_bytes;
  memory_ = MappedMemory(static_cast<size_t>(blocks_) * block_bytes_);
  const SourcePages pages(ranges);
  pool.parallel_for(blocks_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      uint8_t* out = memory_.data() + static_cast<size_t>(b) * block_bytes_;
      if (family_tiles_) {
        pack_tile_block(source, b, reinterpret_cast<uint16_t*>(out));
      } else {
        pack_fma_block(source, b, type_, out);
      }
      const Row first = source_row(source, b * kBlockColumns);
      const Row last = source_row(source, b * kBlockColumns + kBlockColumns - 1);
      if (first.view == nullptr || first.view != last.view) continue;
      const size_t size = dtype_bytes(first.view->dtype);
      pages.done_with(first.view->as<uint8_t>() + static_cast<size_t>(first.begin) * size,
                      static_cast<size_t>(last.begin + k_ - first.begin) * size);
    }
  });
  for (const auto& [data, bytes] : ranges) pages.done_with(data, bytes);
}

size_t LinearDense::scratch_bytes(int64_t rows) const {
  const int64_t depth = family_tiles_ ? round_up(k_, kDepth) : k_;
  return static_cast<size_t>(rows * depth) * 4;  // two bf16 terms, or the normed row
}

void LinearDense::run(const LinearCall& call, void* scratch, ThreadPool& pool) const {
  TM_CHECK((call.epilogue == Epilogue::silu_mul) == (order_ == PartOrder::gate_up),
           "silu_mul needs a weight packed as gate_up, and only that");
  if (call.rows <= 0) return;
  if (family_tiles_) {
    run_tiles(call, static_cast<uint16_t*>(scratch), pool);
  } else {
    run_fma(call, static_cast<float*>(scratch), pool);
  }
}

void LinearDense::run_tiles(const LinearCall& call, uint16_t* planes, ThreadPool& pool) const {
  const int64_t depth = round_up(k_, kDepth);
  RowNorm norm;
  if (call.norm != nullptr) norm = row_norm_of(*call.norm, k_);
  pool.parallel_for(call.rows, std::max<int64_t>(1, 16384 / k_), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = call.x + row * k_;
      const NormStats stats = call.norm != nullptr ? kernels_.norm_stats(norm, x, k_) : NormStats{};
      const int64_t first = row / kTileRows * kTileRows;
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, call.rows - first));
      kernels_.bf16_split(call.norm != nullptr ? &norm : nullptr, stats, x, k_,
                          planes + first * depth * 2, rows, static_cast<int>(row - first));
    }
  });
  // Few rows wait for memory: single blocks share it out evenly. Many rows reuse what the caches
  // hold.
  const int64_t per_task = call.rows <= 2 * kTileRows ? 1 : kTaskBlocks;
  const int64_t strips = ceil_div(call.rows, kTaskRows), groups = ceil_div(blocks_, per_task);
  const int64_t grain = per_task > 1 ? 1 : block_grain(strips, block_bytes_);
  pool.parallel_for(strips * groups, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kSums = kTaskRows * kBlockColumns;
    alignas(64) float acc[kTaskBlocks * kSums];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / groups * kTaskRows;
      const int64_t rows = std::min(kTaskRows, call.rows - row);
      const int64_t first = task % groups * per_task;
      const int64_t count = std::min(per_task, blocks_ - first);
      kernels_.bf16_tiles(reinterpret_cast<const uint16_t*>(block(first)), static_cast<int>(count),
                          k_, planes + row * depth * 2, rows, acc, kSums);
      for (int64_t i = 0; i < count; ++i) {
        finish_block(kernels_, call, bias_, out_columns_, first + i, row, rows, acc + i * kSums);
      }
    }
  });
}

void LinearDense::run_fma(const LinearCall& call, float* normed, ThreadPool& pool) const {
  const float* x = call.x;
  if (call.norm != nullptr) {
    const RowNorm norm = row_norm_of(*call.norm, k_);
    pool.parallel_for(call.rows, std::max<int64_t>(1, 16384 / k_), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* from = call.x + row * k_;
        kernels_.norm_apply(norm, kernels_.norm_stats(norm, from, k_), from, normed + row * k_, k_);
      }
    });
    x = normed;
  }
  const int64_t strips = ceil_div(call.rows, kTaskRows);
  pool.parallel_for(strips * blocks_, block_grain(strips, block_bytes_),
                    [&](int64_t begin, int64_t end) {
                      alignas(64) float acc[kTaskRows * kBlockColumns];
                      for (int64_t task = begin; task < end; ++task) {
                        const int64_t row = task / blocks_ * kTaskRows;
                        const int64_t rows = std::min(kTaskRows, call.rows - row);
                        const int64_t b = task % blocks_;
                        kernels_.dense_fma(type_, block(b), k_, x + row * k_, k_, rows, acc);
                        finish_block(kernels_, call, bias_, out_columns_, b, row, rows, acc);
                      }
                    });
}

}  // namespace turbomind::cpu
