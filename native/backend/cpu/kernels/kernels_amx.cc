// AMX kernels: matrix units for several rows of 4-bit weights and for all bf16 layers; the AVX-512
// code, compiled once more, for the rest.
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

#include "backend/cpu/kernels/isa_amx_begin.h"

namespace turbomind::cpu {
namespace amx_kernels {
namespace {

constexpr int kFmaRows = 12;
constexpr int kFmaHalves = 2;

#include "backend/cpu/kernels/vec_avx512.inl"

#include "backend/cpu/kernels/rows.inl"

#include "backend/cpu/kernels/dense_rows.inl"

#include "backend/cpu/kernels/u4_vnni.inl"

#include "backend/cpu/kernels/amx_tiles.inl"

}  // namespace
}  // namespace amx_kernels
}  // namespace turbomind::cpu

#include "backend/cpu/kernels/isa_end.h"

namespace turbomind::cpu {

const Kernels kAmxKernels = {
    .isa = Isa::amx,
    .norm_stats = amx_kernels::norm_stats,
    .norm_apply = amx_kernels::norm_apply,
    .u4_quantize = amx_kernels::u4_quantize,
    .u4_rows = amx_kernels::u4_rows,
    .u4_tiles = amx_kernels::u4_tiles,
    .dense_fma = amx_kernels::dense_fma,
    .bf16_split = amx_kernels::bf16_split,
    .bf16_tiles = amx_kernels::bf16_tiles,
    .finish = amx_kernels::finish,
    .dot = amx_kernels::dot,
    .pack_head_row = amx_kernels::pack_head_row,
    .screen = amx_kernels::screen_tiles,
};

}  // namespace turbomind::cpu
#endif  // __x86_64__
