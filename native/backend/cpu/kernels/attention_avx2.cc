// Attention on AVX2 + FMA. Bound by fma: 6 rows x 16 columns of accumulators.
#include <immintrin.h>

#include <cstdint>

#include "backend/cpu/kernels/attention_kernels.h"
#include "backend/cpu/kernels/kv_parameters.h"

#include "backend/cpu/kernels/isa_avx2_begin.h"
namespace turbomind::cpu {
namespace {

constexpr int kBlockRows = 6;
constexpr int kBlockVectors = 1;
// Decode: a few rows read each key and value once.
constexpr int kStreamRows = 2;
constexpr int kStreamVectors = 2;

#include "backend/cpu/kernels/vec_avx2.inl"

#include "backend/cpu/kernels/attention_split.inl"

#include "backend/cpu/kernels/kv_quant.inl"

}  // namespace

const AttentionKernels kAttentionAvx2 = {split_kernel, quantize_kernel, dequantize8_kernel,
                                         dequantize4_kernel, transpose16_kernel};

}  // namespace turbomind::cpu
#include "backend/cpu/kernels/isa_end.h"
