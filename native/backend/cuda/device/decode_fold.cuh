// How the parts of decode attention come together: one after the other, left to right, by the definition
// in flash.cuh, whoever holds them. A CTA that has a sequence's first part folds it and those after it in
// registers. If the sequence goes on in other CTAs, what it has, and each of their parts, goes to L2; the
// CTA that comes last, by a ticket, folds the others onto the first. Steps of at most one unit a CTA do it
// with the same bits by decode_records.cuh. Device only.
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

// Place of a unit's registers [o][n] of this lane among the parts in L2.
template <class C>
__device__ __forceinline__ int64_t partial_index(const Params& p, int64_t unit, int m, int n,
                                                 int lane) {
  return ((unit * C::kSteps + m) * p.pairs + n * 4 + lane % 4) * 8 + lane / 4;
}

// A part, or what has been folded up to it, to L2 in the place of unit `index`.
template <class C>
__device__ __forceinline__ void store_part(const Out<C>& out, const float2 (&largest)[C::kN],
                                           const float2 (&sum)[C::kN], const Params& p, int index,
                                           int warp, int lane) {
  auto* partial = reinterpret_cast<float4*>(p.args.partial_out);
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    if (n * 4 + lane % 4 >= p.pairs) continue;
#pragma unroll
    for (int o = 0; o < C::kOwn; ++o) {
      const int m = warp + kWarps * o;
      if (!C::owns(warp, o)) break;
      __stcg(partial + partial_index<C>(p, index, m, n, lane),
             make_float4(out[o][n][0], out[o][n][1], out[o][n][2], out[o][n][3]));
    }
    if (warp == 0 && lane < 4) {
      __stcg(reinterpret_cast<float4*>(p.args.partial_max_sum) +
                 static_cast<int64_t>(index) * p.pairs + n * 4 + lane,
             make_float4(largest[n].x, sum[n].x, largest[n].y, sum[n].y));
    }
  }
}

// Factors of up to 32 parts for the columns of this warp, a part a lane; `largest`: maxima before them.
template <class C>
__device__ __forceinline__ void fold_chunk(FoldChunk<C>& chunk, float (&largest)[C::kColumns / 4],
                                           const Params& p, int64_t first, int count, int warp,
                                           int lane) {
#pragma unroll
  for (int i = 0; i < C::kColumns / kWarps; ++i) {
    const int column = warp * (C::kColumns / kWarps) + i;
    float2 max_sum{-INFINITY, 0.0F};
    if (lane < count && column < 2 * p.pairs) {
      max_sum = __ldcg(p.args.partial_max_sum + (first + lane) * 2 * p.pairs + column);
    }
    float after = max_sum.x;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float other = __shfl_up_sync(~0U, after, offset);
      if (lane >= offset) after = fmaxf(after, other);
    }
    after = fmaxf(largest[i], after);
    float before = __shfl_up_sync(~0U, after, 1);
    if (lane == 0) before = largest[i];
    largest[i] = __shfl_sync(~0U, after, 31);
    const FoldFactors factors = fold_factors(before, max_sum.x, p.scale_log2);
    reinterpret_cast<float2*>(chunk.factors[lane])[column] = {factors.before, factors.part};
    reinterpret_cast<float*>(chunk.sums[lane])[column] = max_sum.y;
  }
}

// All parts of a sequence are in L2: folds units `first`, with kRuns a fold already, to `end`.
template <class C>
__device__ __forceinline__ void fold_parts(FoldChunk<C>& chunk, const Params& p, const Unit& unit,
                                           int first, int end, int warp, int lane) {
  // The first fragment of the next part; those of a part lie `step` apart, parts themselves `stride`.
  const auto* next = reinterpret_cast<const float4*>(p.args.partial_out) +
                     partial_index<C>(p, first, warp, 0, lane);
  const int step = kWarps * p.pairs * 8;
  const int stride = C::kSteps * p.pairs * 8;
  Total<C> total;
  clear(total);
  float largest[C::kColumns / 4];
#pragma unroll
  for (float& x : largest) x = -INFINITY;
  bool is_first = C::kRuns;
#pragma unroll 1
  for (int begin = first; begin < end; begin += kFoldParts) {
    const int count = min(kFoldParts, end - begin);
    consumer_sync();
    fold_chunk<C>(chunk, largest, p, begin, count, warp, lane);
    consumer_sync();
#pragma unroll 1
    for (int batch = 0; batch < count; batch += C::kFoldBatch) {
      float4 values[C::kFoldBatch][C::kOwn][C::kN];
#pragma unroll
      for (int i = 0; i < C::kFoldBatch; ++i) {
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
#pragma unroll
          for (int n = 0; n < C::kN; ++n) {
            if (batch + i < count && warp + kWarps * o < C::kSteps && n * 4 + lane % 4 < p.pairs) {
              values[i][o][n] = __ldcg(next + o * step + n * 32);
            }
          }
        }
        next += stride;
      }
#pragma unroll
      for (int i = 0; i < C::kFoldBatch; ++i) {
        if (batch + i >= count) break;
#pragma unroll
        for (int n = 0; n < C::kN; ++n) {
          const float4 f = chunk.factors[batch + i][n * 4 + lane % 4];
          const float2 s = chunk.sums[batch + i][n * 4 + lane % 4];
          const FoldFactors x{f.x, f.y};
          const FoldFactors y{f.z, f.w};
          total.sum[n] = {fold(total.sum[n].x, s.x, x), fold(total.sum[n].y, s.y, y)};
#pragma unroll
          for (int o = 0; o < C::kOwn; ++o) {
            const float4& v = values[i][o][n];
            fold_four(total.out[o][n], v, x, y);
            // The first one stays as it is: folded onto nothing, a zero could lose its sign.
            if (i == 0 && is_first) {
              total.out[o][n][0] = v.x;
              total.out[o][n][1] = v.y;
              total.out[o][n][2] = v.z;
              total.out[o][n][3] = v.w;
            }
          }
        }
      }
      is_first = false;
    }
  }
  store_rows<C>(total, p, unit, warp, lane);
}

// Counts `count` at a ticket: what the CTA's threads wrote before a barrier before it is seen by those
// that come after, and the other way round.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* ticket, uint32_t count) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(ticket), "r"(count)
               : "memory");
  return before;
}

// This CTA has finished `count` parts of a sequence whose first is unit `first`: counts them, and folds all
// if they are the last.
template <class C>
__device__ __forceinline__ void finish_parts(FoldChunk<C>& chunk, const Params& p, const Unit& unit,
                                             int first, int count, const Run& run, bool* last,
                                             int warp, int lane) {
  const DecodeAttentionArgs& a = p.args;
  consumer_sync();
  uint32_t* ticket =
      a.tickets +
      (static_cast<int64_t>(unit.sequence) * p.column_blocks + unit.column0 / C::kColumns) *
          a.num_kv_heads +
      unit.kv_head;
  if (threadIdx.x == 0) {
    *last = take_ticket(ticket, static_cast<uint32_t>(count)) ==
            static_cast<uint32_t>(unit.parts - count);
  }
  consumer_sync();
  if (!*last) return;
  const int end = first + unit.parts;
  if (C::kRuns) {  // what the CTA of the first part has folded ends with that CTA's units
    const int64_t grid = gridDim.x;
    const int cta = static_cast<int>(((first + 1) * grid - 1) / run.units);
    first = run_begin(run.units, cta + 1) - 1;
  }
  fold_parts<C>(chunk, p, unit, first, end, warp, lane);
  if (threadIdx.x == 0) *ticket = 0;
}

}  // namespace turbomind::cuda::decode
