// Hopper's asynchronous matrix instruction, m64nNk16 with f32 accumulators. `rs` takes A from
// registers (dequantised weights), `ss` from shared memory. B is always in shared memory, [N][64] of
// 2 bytes with the 128-byte swizzle that the bulk tensor copies write. `first` true ignores the old
// accumulators. The shapes differ only in the text of their register list, built up by macros below.
// Device only, sm_90a only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace turbomind::cuda {

// Rows of 128 bytes, eight rows a swizzle atom of 1024 bytes; `address` is 1024-aligned plus 32 for
// each k16 step inside the row.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffU) >> 4) | (uint64_t{1} << 16) |
         (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// The same in two parts: the low word, to which the distance to another tile may be added in units of 16
// bytes, and what follows from it.
__device__ __forceinline__ uint32_t wgmma_descriptor_low(uint32_t address) {
  return (address & 0x3ffffU) >> 4 | 1U << 16;
}
__device__ __forceinline__ uint64_t wgmma_descriptor_at(uint32_t low) {
  return low | uint64_t{1024 >> 4 | 1U << 30} << 32;
}

// Orders earlier register writes before the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// d: kN / 2 accumulators of a thread.
template <class T, int kN>
struct Wgmma;

// clang-format off
// Placeholders of the accumulators, and the operands that fill them.
#define TM_REGS_4 "%0, %1, %2, %3"
#define TM_REGS_8 TM_REGS_4 \
  ", %4, %5, %6, %7"
#define TM_REGS_16 TM_REGS_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TM_REGS_32 TM_REGS_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TM_REGS_64 TM_REGS_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TM_REGS_128 TM_REGS_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TM_OUT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TM_OUT_8(i) TM_OUT_4(i), TM_OUT_4(i + 4)
#define TM_OUT_16(i) TM_OUT_8(i), TM_OUT_8(i + 8)
#define TM_OUT_32(i) TM_OUT_16(i), TM_OUT_16(i + 16)
#define TM_OUT_64(i) TM_OUT_32(i), TM_OUT_32(i + 32)
#define TM_OUT_128(i) TM_OUT_64(i), TM_OUT_64(i + 64)

// P0..P5: placeholders after the accumulators.
#define TM_WGMMA(T, type, acc, n, P0, P1, P2, P3, P4, P5)                                          \
  template <>                                                                                      \
  struct Wgmma<T, n> {                                                                             \
    static __device__ __forceinline__ void rs(float* d, const uint32_t (&a)[4], uint64_t b,        \
                                              bool first) {                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {"            \
                   TM_REGS_##acc "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, 0;\n}\n"    \
                   : TM_OUT_##acc(0)                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(first ? 0 : 1));      \
    }                                                                                              \
    /* B with its rows along k, transposed on the way in. */                                       \
    static __device__ __forceinline__ void rs_transposed(float* d, const uint32_t (&a)[4],         \
                                                         uint64_t b, bool first) {                 \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {"            \
                   TM_REGS_##acc "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, 1;\n}\n"    \
                   : TM_OUT_##acc(0)                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(first ? 0 : 1));      \
    }                                                                                              \
    static __device__ __forceinline__ void ss(float* d, uint64_t a, uint64_t b, bool first) {      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {"            \
                   TM_REGS_##acc "}, " P0 ", " P1 ", p, 1, 1, 0, 0;\n}\n"                           \
                   : TM_OUT_##acc(0)                                                               \
                   : "l"(a), "l"(b), "r"(first ? 0 : 1));                                          \
    }                                                                                              \
  };
#define TM_WGMMA_TYPES(acc, n, ...)                     \
  TM_WGMMA(__nv_bfloat16, "bf16", acc, n, __VA_ARGS__)  \
  TM_WGMMA(__half, "f16", acc, n, __VA_ARGS__)
TM_WGMMA_TYPES(4, 8, "%4", "%5", "%6", "%7", "%8", "%9")
TM_WGMMA_TYPES(8, 16, "%8", "%9", "%10", "%11", "%12", "%13")
TM_WGMMA_TYPES(16, 32, "%16", "%17", "%18", "%19", "%20", "%21")
TM_WGMMA_TYPES(32, 64, "%32", "%33", "%34", "%35", "%36", "%37")
TM_WGMMA_TYPES(64, 128, "%64", "%65", "%66", "%67", "%68", "%69")
TM_WGMMA_TYPES(128, 256, "%128", "%129", "%130", "%131", "%132", "%133")
#undef TM_WGMMA_TYPES
#undef TM_WGMMA
#undef TM_OUT_128
#undef TM_OUT_64
#undef TM_OUT_32
#undef TM_OUT_16
#undef TM_OUT_8
#undef TM_OUT_4
#undef TM_REGS_128
#undef TM_REGS_64
#undef TM_REGS_32
#undef TM_REGS_16
#undef TM_REGS_8
#undef TM_REGS_4
// clang-format on

}  // namespace turbomind::cuda
