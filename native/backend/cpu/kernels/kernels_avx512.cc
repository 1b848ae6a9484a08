// AVX-512 kernels (F, BW, DQ, VL, VNNI). vdpbf16ps is not used: float32-class activations take two
// bf16 terms, and two of those per 32 products are no faster than two f32 fmas.
#if defined(__x86_64__)
#include "backend/cpu/kernels/kernel_table.h"

// GCC 12 takes the intrinsics' own "undefined" registers for mistakes of ours.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels/float_formats.h"

#include "backend/cpu/kernels/isa_avx512_begin.h"

namespace turbomind::cpu {
namespace avx512_kernels {
namespace {

constexpr int kFmaRows = 12;
constexpr int kFmaHalves = 2;

#include "backend/cpu/kernels/vec_avx512.inl"

#include "backend/cpu/kernels/rows.inl"

#include "backend/cpu/kernels/dense_rows.inl"

#include "backend/cpu/kernels/u4_vnni.inl"

}  // namespace
}  // namespace avx512_kernels
}  // namespace turbomind::cpu

#include "backend/cpu/kernels/isa_end.h"

namespace turbomind::cpu {

const Kernels kAvx512Kernels = {
    .isa = Isa::avx512,
    .norm_stats = avx512_kernels::norm_stats,
    .norm_apply = avx512_kernels::norm_apply,
    .u4_quantize = avx512_kernels::u4_quantize,
    .u4_rows = avx512_kernels::u4_rows,
    .u4_tiles = nullptr,
    .dense_fma = avx512_kernels::dense_fma,
    .bf16_split = nullptr,
    .bf16_tiles = nullptr,
    .finish = avx512_kernels::finish,
    .dot = avx512_kernels::dot,
    .screen = avx512_kernels::screen,
};

}  // namespace turbomind::cpu
#endif  // __x86_64__
