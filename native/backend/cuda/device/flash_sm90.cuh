// wgmma for attention: P (registers) times V, whose tiles lie in shared memory as [token][64 dims] in the
// 128-byte swizzle and so are transposed on the way in. Device only, sm_90a only.
#pragma once

#include "backend/cuda/device/wgmma.cuh"

namespace turbomind::cuda {

// Low word of the descriptor of 16 tokens x N dims: eight tokens every 1024 bytes, 64 dims every
// `chunk_bytes`. The high word is that of wgmma_descriptor_at.
__device__ __forceinline__ uint32_t wgmma_transposed_low(uint32_t address, int chunk_bytes) {
  return (address & 0x3ffffU) >> 4 | static_cast<uint32_t>(chunk_bytes >> 4) << 16;
}

template <class T, int kN>
struct WgmmaTransposed;

// clang-format off
#define TM_REGS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TM_REGS_64 TM_REGS_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TM_OUT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TM_OUT_16(i) TM_OUT_4(i), TM_OUT_4(i + 4), TM_OUT_4(i + 8), TM_OUT_4(i + 12)
#define TM_OUT_32(i) TM_OUT_16(i), TM_OUT_16(i + 16)
#define TM_OUT_64(i) TM_OUT_32(i), TM_OUT_32(i + 32)
// P0..P5: placeholders after the accumulators.
#define TM_WGMMA_TRANSPOSED(T, type, acc, n, P0, P1, P2, P3, P4, P5)                               \
  template <>                                                                                      \
  struct WgmmaTransposed<T, n> {                                                                   \
    static __device__ __forceinline__ void rs(float (&d)[acc], const uint32_t (&a)[4], uint64_t b, \
                                              bool first) {                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {"            \
                   TM_REGS_##acc "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, 1;\n}\n"    \
                   : TM_OUT_##acc(0)                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(first ? 0 : 1));      \
    }                                                                                              \
  };
#define TM_WGMMA_TRANSPOSED_TYPES(acc, n, ...)                     \
  TM_WGMMA_TRANSPOSED(__nv_bfloat16, "bf16", acc, n, __VA_ARGS__)  \
  TM_WGMMA_TRANSPOSED(__half, "f16", acc, n, __VA_ARGS__)
TM_WGMMA_TRANSPOSED_TYPES(32, 64, "%32", "%33", "%34", "%35", "%36", "%37")
TM_WGMMA_TRANSPOSED_TYPES(64, 128, "%64", "%65", "%66", "%67", "%68", "%69")
#undef TM_WGMMA_TRANSPOSED_TYPES
#undef TM_WGMMA_TRANSPOSED
#undef TM_OUT_64
#undef TM_OUT_32
#undef TM_OUT_16
#undef TM_OUT_4
#undef TM_REGS_64
#undef TM_REGS_32
// clang-format on

}  // namespace turbomind::cuda
