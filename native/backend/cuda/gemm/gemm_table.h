// y = epilogue(x * W^T + bias): which kernel runs is a row of one table, the first that fits.
//
// Determinism: K is cut into `segments` fixed per (N, K, kind). Each is summed in its own f32 chain
// of k16 steps, and the segments are added in order, whatever the kernel's tile and whether one CTA
// runs them in turn or several share them. So a row of y does not depend on M or on its place in x.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "backend/cuda/cuda_check.h"
#include "backend/op_kinds.h"
#include "backend/weights.h"

namespace turbomind::cuda {

inline constexpr int kPackRows = 64;       // rows of a packed 4-bit tile, and the padding of N
inline constexpr int kPackColumns = 64;    // columns of it
inline constexpr int kChunkColumns = 128;  // K of 4-bit weights is padded to this

// A weight matrix on the device, in the layout that all kernels read.
//  dense: weights T [n_padded, k_padded] row-major.
//  awq:   weights [n_padded / 64, k_padded / 64, 4 warps, 32 lanes, 4 k16 steps] words of eight
//         nibbles, meta [n_padded / 64, k_padded / group, 64 rows] words (device/dequant.cuh). Its
//         weights are (q - zero) * scale rounded to dtype, the scale having been rounded to it first.
// gate_up: rows 16i..16i+7 are gate outputs 8i..8i+7, rows 16i+8..16i+15 the up outputs.
struct PackedMatrix {
  WeightKind kind = WeightKind::dense;
  DType dtype = DType::bf16;  // of activations, dense weights and dequantised ones
  int64_t n = 0;
  int64_t k = 0;
  int64_t n_padded = 0;
  int64_t k_padded = 0;
  int group_size = 0;
  bool gate_up = false;
  int segments = 1;
  const void* weights = nullptr;
  const uint32_t* meta = nullptr;
  const float* bias = nullptr;  // [n_padded] or null
};

// An RMSNorm between two products without a kernel of its own. The product that writes x (residual) also
// writes z = x * weight / peak, rounded to T, and for each token and strip of columns the sum of x squared.
// The product that reads the norm takes z as its x and multiplies its f32 sums by
// peak * rsqrt(mean of squares + eps), folded out of the token's strips. `peak`: a power of two, no less
// than any |weight|, so dividing by it is exact and |z| <= |x|: in f16 z does not overflow; below 6e-5 it
// loses bits, as x itself does. Sums are trees of fixed shape (split_norm.cuh): every kernel gives the
// same bits, and strips of either width the same factor.
inline constexpr int kNarrowStrip = 16;
inline constexpr int kWideStrip = 64;  // the width of x is a multiple of it

// Columns of the strips that a product with such weights leaves in a step of `tokens` rows. Wide ones leave a
// quarter of the sums to read, where every CTA reads them; but the kernels of few tokens have tiles of any multiple
// of 16 rows of W, and with many tokens one kernel reads the sums.
inline constexpr int kNarrowTokens = 16;
// The most with wide strips: of 16-bit weights, whose widest tiles lack registers for them, and of 4-bit ones.
inline constexpr int kWideTokens = 128;
inline constexpr int kFoldTokens = 256;
constexpr int strip_columns(WeightKind writer, int tokens) {
  const int most = writer == WeightKind::awq ? kFoldTokens : kWideTokens;
  return tokens > kNarrowTokens && tokens <= most ? kWideStrip : kNarrowStrip;
}

// Whether all CTAs of a product may fold the same strips before their products: at most 8 KiB, 16 where rows are
// short; more cost them more than a kernel that does it once.
constexpr bool few_strips(int64_t columns, int strip_columns, int tokens) {
  constexpr int64_t kShort = 2048;
  const int64_t bytes = tokens * columns / strip_columns * int64_t{sizeof(float)};
  return bytes <= (columns <= kShort ? 16 : 8) * 1024;
}

struct NextNorm {                 // written beside y
  const float* weight = nullptr;  // [n]; null: nothing is written
  float inverse_peak = 1.0F;
  void* z = nullptr;        // T [m, n]
  float* strips = nullptr;  // [m, n / strip_columns]
  int strip_columns = kNarrowStrip;
};
struct InputNorm {                // of z
  const float* strips = nullptr;  // [m, columns / strip_columns]; null: x is x
  const float* scales = nullptr;  // [m], what fold_strips has made of them; null: CTAs fold
  int strip_columns = kNarrowStrip;
  int columns = 0;
  float inverse_columns = 0.0F;
  float peak = 1.0F;
  float eps = 0.0F;
};

struct GemmArgs {
  const PackedMatrix* w = nullptr;
  const void* x = nullptr;  // T [m, k], row stride ldx (elements, a multiple of 8)
  int64_t ldx = 0;
  int m = 0;
  void* y = nullptr;  // T or f32, row stride ldy
  int64_t ldy = 0;
  bool y_is_f32 = false;
  Epilogue epilogue = Epilogue::none;
  const float* scale = nullptr;  // residual only: [n] or null
  InputNorm input_norm{};
  NextNorm next_norm{};       // residual only
  float* partials = nullptr;  // workspace for segments that several CTAs share
  size_t partial_floats = 0;
  uint32_t* tickets = nullptr;  // zero between launches
  size_t num_tickets = 0;
};

struct GemmKernel {
  std::string_view name;
  int min_sm;
  int max_sm;
  int min_tokens;  // M from which this row is the one to take; asked for by name it runs at any
  bool (*supports)(const GemmArgs&, const LaunchContext&);
  void (*run)(const GemmArgs&, const LaunchContext&);
};

// scales[t] = the factor of each of `tokens` tokens of norm.strips, as CTAs would fold it (kernels/norm.cu).
void fold_strips(const LaunchContext& context, const InputNorm& norm, float* scales, int tokens);

std::span<const GemmKernel> gemm_table();
// The first row that fits; `name`, when not empty, asks for that row (tests, benchmarks).
const GemmKernel& select_gemm(const GemmArgs& args, const LaunchContext& context,
                              std::string_view name = {});

// Segments of K for a shape; a pure function, the same on every device.
int choose_segments(WeightKind kind, int64_t n, int64_t k);

// Loading 4-bit weights: the checkpoint's arrays, already on the device, to the packed layout.
struct AwqPart {
  const uint32_t* qweight = nullptr;  // [K, N / 8]
  const uint32_t* qzeros = nullptr;   // [K / g, N / 8]
  const void* scales = nullptr;       // [K / g, N]
  int64_t n = 0;
  int64_t base = 0;  // first packed row, for concatenated parts
};
inline constexpr int kMaxParts = 4;
struct AwqPackArgs {
  AwqPart parts[kMaxParts];
  int num_parts = 0;
  DType scale_type = DType::f16;
  PackedMatrix matrix;
  uint32_t* weights = nullptr;
  uint32_t* meta = nullptr;
};
void pack_awq(const LaunchContext& context, const AwqPackArgs& args);

// Rows of the table, one file each.
bool supports_naive(const GemmArgs&, const LaunchContext&);
void gemm_naive(const GemmArgs&, const LaunchContext&);
bool supports_u4_sm80(const GemmArgs&, const LaunchContext&);
void u4_gemm_sm80(const GemmArgs&, const LaunchContext&);
bool supports_dense_sm80(const GemmArgs&, const LaunchContext&);
void dense_gemm_sm80(const GemmArgs&, const LaunchContext&);
bool supports_u4_sm90(const GemmArgs&, const LaunchContext&);
void u4_gemm_sm90(const GemmArgs&, const LaunchContext&);
bool supports_dense_sm90(const GemmArgs&, const LaunchContext&);
void dense_gemm_sm90(const GemmArgs&, const LaunchContext&);

}  // namespace turbomind::cuda
