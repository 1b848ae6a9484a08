// Attention on AVX-512 F/BW/VL/DQ. Bound by fma: 14 rows x 32 columns of accumulators.

// GCC 12 takes the "undefined" operand of its own AVX-512 headers for an uninitialised variable.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "backend/cpu/kernels/attention_kernels.h"
#include "backend/cpu/kernels/kv_parameters.h"

#include "backend/cpu/kernels/isa_avx512_begin.h"
namespace turbomind::cpu {
namespace {

constexpr int kBlockRows = 14;
constexpr int kBlockVectors = 2;
// Decode: a few rows read each key and value once.
constexpr int kStreamRows = 7;
constexpr int kStreamVectors = 4;

#include "backend/cpu/kernels/vec_avx512.inl"

#include "backend/cpu/kernels/attention_split.inl"

#include "backend/cpu/kernels/kv_quant.inl"

}  // namespace

const AttentionKernels kAttentionAvx512 = {split_kernel, quantize_kernel, dequantize8_kernel,
                                           dequantize4_kernel, transpose16_kernel};

}  // namespace turbomind::cpu
#include "backend/cpu/kernels/isa_end.h"
