// The reference of every GEMM row, 4-bit and dense: one thread computes one output (or one gated
// pair) in f32, groups in order. It reads the packed layout bit by bit, so it also judges packing.
// Also the packing itself, done once at load: bound by reading the checkpoint's arrays.
#include "backend/cuda/device/dequant.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/gemm/epilogue.cuh"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 256;

// Nibble of (row, column): the inverse of what pack_awq_kernel writes.
__device__ int packed_nibble(const uint32_t* weights, int64_t k_padded, int row, int column) {
  const int in_row = row % 16;
  const int in_step = column % 16;
  const int lane = (in_row % 8) * 4 + (in_step % 8) / 2;
  const int pair = (in_row / 8) + 2 * (in_step / 8);
  const int64_t tile =
      static_cast<int64_t>(row / kPackRows) * (k_padded / kPackColumns) + column / kPackColumns;
  const int64_t word =
      ((tile * 4 + row % kPackRows / 16) * 32 + lane) * 4 + column % kPackColumns / 16;
  return static_cast<int>(weights[word] >> (4 * pair + 16 * (column % 2))) & 0xf;
}

template <class T>
__device__ float dot_row(const PackedMatrix& w, const T* x, int row) {
  float total = 0.0F;
  if (w.kind == WeightKind::dense) {
    const T* weights = static_cast<const T*>(w.weights) + row * w.k_padded;
    for (int k = 0; k < w.k; ++k) total = fmaf(to_float(weights[k]), to_float(x[k]), total);
    return total;
  }
  for (int k0 = 0; k0 < w.k; k0 += w.group_size) {
    const uint32_t meta =
        w.meta[(row / kPackRows * (w.k_padded / w.group_size) + k0 / w.group_size) * kPackRows +
               row % kPackRows];
    const float zero = group_zero<T>(meta);
    const float scale = group_scale<T>(meta);
    for (int k = k0; k < k0 + w.group_size; ++k) {
      const int q = packed_nibble(static_cast<const uint32_t*>(w.weights), w.k_padded, row, k);
      const float weight = to_float(from_float<T>((static_cast<float>(q) - zero) * scale));
      total = fmaf(weight, to_float(x[k]), total);
    }
  }
  return total;
}

// Thread: eight outputs of a token, so that the gated pairing is the one of the fast kernels.
template <class T>
__global__ void naive_kernel(const PackedMatrix w, const T* x, int64_t ldx, EpilogueParams p) {
  grid_dependency_wait();
  grid_dependency_launch();
  const bool gated = p.kind == Epilogue::silu_mul;
  const int n = (blockIdx.x * kThreads + threadIdx.x) * (gated ? 16 : 8);
  const int t = blockIdx.y;
  float factor = 1.0F;
  if (p.input_norm.scales != nullptr) factor = __ldcg(p.input_norm.scales + t);
  if (folds_strips(p.input_norm)) factor = fold_strips_of(p.input_norm, t, true);
  if (n >= p.n) return;
  float v[8];
  float other[8] = {};
  for (int i = 0; i < 8; ++i) {
    v[i] = n + i < p.n ? dot_row<T>(w, x + t * ldx, n + i) : 0.0F;
    if (gated) other[i] = dot_row<T>(w, x + t * ldx, n + 8 + i);
  }
  finish8<T>(p, t, n, v, other, factor);
}

struct PackedRow {
  int part;   // -1: padding
  int64_t n;  // output of that part
};

__device__ PackedRow locate(const AwqPackArgs& args, int64_t row) {
  if (args.matrix.gate_up) {
    const int part = row % 16 >= 8 ? 1 : 0;
    const int64_t n = row / 16 * 8 + row % 8;
    return {n < args.parts[part].n ? part : -1, n};
  }
  for (int i = 0; i < args.num_parts; ++i) {
    if (row < args.parts[i].base + args.parts[i].n) return {i, row - args.parts[i].base};
  }
  return {-1, 0};
}

// The nibble of column n in row `line` of an AWQ array with n_total columns.
__device__ uint32_t awq_nibble(const uint32_t* array, int64_t n_total, int64_t line, int64_t n) {
  // kAwqColumnOfNibble = {0, 2, 4, 6, 1, 3, 5, 7}, inverted.
  const int nibble = static_cast<int>(n % 2) * 4 + static_cast<int>(n % 8) / 2;
  return (array[line * (n_total / 8) + n / 8] >> (4 * nibble)) & 0xfU;
}

__global__ void pack_weights_kernel(const AwqPackArgs args) {
  const PackedMatrix& w = args.matrix;
  const int64_t word = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (word >= w.n_padded * w.k_padded / 8) return;
  const int step = static_cast<int>(word % 4);
  const int lane = static_cast<int>(word / 4 % 32);
  const int warp = static_cast<int>(word / 128 % 4);
  const int64_t tile = word / 512;
  const int64_t k_tiles = w.k_padded / kPackColumns;
  const int64_t row = tile / k_tiles * kPackRows + warp * 16 + lane / 4;
  const int64_t column = tile % k_tiles * kPackColumns + step * 16 + lane % 4 * 2;
  uint32_t bits = 0;
  for (int pair = 0; pair < 4; ++pair) {
    const PackedRow source = locate(args, row + pair % 2 * 8);
    if (source.part < 0) continue;
    const AwqPart& part = args.parts[source.part];
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t k = column + pair / 2 * 8 + odd;
      if (k >= w.k) continue;
      bits |= awq_nibble(part.qweight, part.n, k, source.n) << (4 * pair + 16 * odd);
    }
  }
  args.weights[word] = bits;
}

__device__ float scale_of(const AwqPackArgs& args, const AwqPart& part, int64_t index) {
  if (args.scale_type == DType::f32) return static_cast<const float*>(part.scales)[index];
  if (args.scale_type == DType::bf16) {
    return to_float(static_cast<const __nv_bfloat16*>(part.scales)[index]);
  }
  return to_float(static_cast<const __half*>(part.scales)[index]);
}

__global__ void pack_meta_kernel(const AwqPackArgs args) {
  const PackedMatrix& w = args.matrix;
  const int64_t groups = w.k_padded / w.group_size;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= w.n_padded * groups) return;
  const int64_t group = i / kPackRows % groups;
  const int64_t row = i / kPackRows / groups * kPackRows + i % kPackRows;
  const PackedRow source = locate(args, row);
  uint32_t word = 0;
  if (source.part >= 0 && group * w.group_size < w.k) {
    const AwqPart& part = args.parts[source.part];
    const uint32_t zero = awq_nibble(part.qzeros, part.n, group, source.n);
    const float scale = scale_of(args, part, group * part.n + source.n);
    word = w.dtype == DType::bf16 ? group_word(from_float<__nv_bfloat16>(scale), zero)
                                  : group_word(from_float<__half>(scale), zero);
  }
  args.meta[i] = word;
}

}  // namespace

bool supports_naive(const GemmArgs&, const LaunchContext&) { return true; }

void gemm_naive(const GemmArgs& args, const LaunchContext& context) {
  const int width = args.epilogue == Epilogue::silu_mul ? 16 : 8;
  const auto columns = static_cast<unsigned>(ceil_div<int64_t>(args.w->n, width * kThreads));
  visit_dtype(args.w->dtype, [&]<class T>() {
    launch(naive_kernel<T>,
           {.grid = dim3(columns, static_cast<unsigned>(args.m)), .threads = kThreads},
           context.stream, context.programmatic, *args.w, static_cast<const T*>(args.x), args.ldx,
           epilogue_params(args));
  });
}

void pack_awq(const LaunchContext& context, const AwqPackArgs& args) {
  const PackedMatrix& w = args.matrix;
  const auto words =
      static_cast<unsigned>(ceil_div<int64_t>(w.n_padded * w.k_padded / 8, kThreads));
  launch(pack_weights_kernel, {.grid = dim3(words), .threads = kThreads}, context.stream, false,
         args);
  const auto metas =
      static_cast<unsigned>(ceil_div<int64_t>(w.n_padded * (w.k_padded / w.group_size), kThreads));
  launch(pack_meta_kernel, {.grid = dim3(metas), .threads = kThreads}, context.stream, false, args);
}

}  // namespace turbomind::cuda
