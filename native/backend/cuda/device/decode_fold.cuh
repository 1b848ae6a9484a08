// How the parts of decode attention come together: one after the other, left to right, by the definition
// in flash.cuh, whoever holds them. A CTA that has all parts of a sequence and head folds them as it computes
// them; those that several CTAs have go to L2 (decode_records.cuh). Device only.
#pragma once

#include "backend/cuda/device/decode_unit.cuh"

namespace turbomind::cuda::decode {

// Parts of a sequence so far, of two columns a lane.
template <class C>
struct Total {
  Out<C> out;
  float2 largest[C::kN];
  float2 sum[C::kN];
};
template <class C>
__device__ __forceinline__ void clear(Total<C>& total) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    total.largest[n] = {-INFINITY, -INFINITY};
    total.sum[n] = {0.0F, 0.0F};
#pragma unroll
    for (int o = 0; o < C::kOwn; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total.out[o][n][i] = 0.0F;
    }
  }
}

// A thread's total to shared memory and back, where it is kept there.
template <class C>
__device__ __forceinline__ void keep(Exchange<C>& exchange, const Total<C>& total) {
  if constexpr (C::kSharesTotal) {
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      float4* place = &exchange.total[n * (C::kOwn + 1)][threadIdx.x];
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        const float(&x)[4] = total.out[o][n];
        place[o * kConsumers] = make_float4(x[0], x[1], x[2], x[3]);
      }
      place[C::kOwn * kConsumers] =
          make_float4(total.largest[n].x, total.largest[n].y, total.sum[n].x, total.sum[n].y);
    }
  }
}
template <class C>
__device__ __forceinline__ void recall(Total<C>& total, const Exchange<C>& exchange) {
  if constexpr (C::kSharesTotal) {
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      const float4* place = &exchange.total[n * (C::kOwn + 1)][threadIdx.x];
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        const float4 x = place[o * kConsumers];
        total.out[o][n][0] = x.x;
        total.out[o][n][1] = x.y;
        total.out[o][n][2] = x.z;
        total.out[o][n][3] = x.w;
      }
      const float4 x = place[C::kOwn * kConsumers];
      total.largest[n] = {x.x, x.y};
      total.sum[n] = {x.z, x.w};
    }
  }
}

__device__ __forceinline__ void fold_four(float (&total)[4], const float4& part,
                                          const FoldFactors& x, const FoldFactors& y) {
  total[0] = fold(total[0], part.x, x);
  total[1] = fold(total[1], part.y, y);
  total[2] = fold(total[2], part.z, x);
  total[3] = fold(total[3], part.w, y);
}

// The next part.
template <class C>
__device__ __forceinline__ void fold_part_into(Total<C>& total, const Out<C>& out,
                                               const float2 (&largest)[C::kN],
                                               const float2 (&sum)[C::kN], float scale_log2) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    const FoldFactors x = fold_factors(total.largest[n].x, largest[n].x, scale_log2);
    const FoldFactors y = fold_factors(total.largest[n].y, largest[n].y, scale_log2);
    total.sum[n] = {fold(total.sum[n].x, sum[n].x, x), fold(total.sum[n].y, sum[n].y, y)};
#pragma unroll
    for (int o = 0; o < C::kOwn; ++o) {
      const float(&part)[4] = out[o][n];
      fold_four(total.out[o][n], make_float4(part[0], part[1], part[2], part[3]), x, y);
    }
  }
}

// Where a column's row of y begins.
template <class C>
__device__ __forceinline__ typename C::T* output_row(const Params& p, const Unit& unit,
                                                     int column) {
  const int place = unit.column0 + column;
  const int row = p.row_of(place);
  const int64_t head = unit.kv_head * p.group + place - row * p.group;
  return static_cast<typename C::T*>(p.args.y) +
         (static_cast<int64_t>(unit.row + row) * p.args.num_heads + head) * C::kDim;
}
__device__ __forceinline__ float inverse_of(float sum) { return sum > 0.0F ? 1.0F / sum : 0.0F; }

template <class C>
__device__ __forceinline__ void store_rows(const Total<C>& total, const Params& p, const Unit& unit,
                                           int warp, int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = n * 8 + lane % 4 * 2 + h;
      if (column >= unit.columns) continue;
      auto* y = output_row<C>(p, unit, column) + lane / 4;
      const float inverse = inverse_of(h == 0 ? total.sum[n].x : total.sum[n].y);
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        const int m = warp + kWarps * o;
        if (!C::owns(warp, o)) break;
        y[m * 16] = from_float<typename C::T>(total.out[o][n][h] * inverse);
        y[m * 16 + 8] = from_float<typename C::T>(total.out[o][n][2 + h] * inverse);
      }
    }
  }
}

}  // namespace turbomind::cuda::decode
