// The queries of a unit of decode attention: read, rotated, in shared memory and as the n8 operand. By the
// consumer warps. Device only.
#pragma once

#include "backend/cuda/device/decode_unit.cuh"

namespace turbomind::cuda::decode {

// The query of a column of the unit's sequence.
template <class C>
__device__ __forceinline__ const typename C::T* column_head(const Params& p, const Unit& unit,
                                                            int column) {
  const int place = unit.column0 + column;
  const int row = p.row_of(place);
  return qkv_head<C>(p.args, unit.row + row, unit.kv_head * p.group + place - row * p.group);
}

// The angles of the unit's rows; before the wait for the kernel before, too.
template <class C>
__device__ __forceinline__ void stage_rotations(Exchange<C>& exchange, const Params& p,
                                                const Unit& unit) {
  constexpr int kHalf = C::kDim / 2;
  const RopeArgs& rope = p.args.rope;
  const int rows = unit.num_keys - unit.history;
  for (int i = threadIdx.x; i < rows * kHalf; i += kConsumers) {
    const int position = __ldcg(p.args.step.positions + unit.row + i / kHalf);
    const SineCosine angle = sine_cosine(rope, position, i % kHalf);
    exchange.rotations[i / kHalf][i % kHalf] = {angle.sine, angle.cosine};
  }
}
template <int kDim>
__device__ __forceinline__ Rotation load_rotation(const float2 (&angles)[kDim / 2], int lane) {
  Rotation rotation;
#pragma unroll
  for (int i = 0; i < kHeadPairs; ++i) {
    const float2 angle = lane + 32 * i < kDim / 2 ? angles[lane + 32 * i] : float2{0.0F, 1.0F};
    rotation.sine[i] = angle.x;
    rotation.cosine[i] = angle.y;
  }
  return rotation;
}

// A column's query, rounded as a row of q is, then as products take it.
template <class C>
__device__ __forceinline__ void store_query(typename C::Product* row, const Head& head, int lane) {
  using T = typename C::T;
#pragma unroll
  for (int p = 0; p < kHeadPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= C::kDim / 2) continue;
    const uint32_t pair = product_pair<T, C::kBits>(pack_pair<T>(head.low[p], head.high[p]));
    const auto& values = reinterpret_cast<const typename C::Product(&)[2]>(pair);
    row[i] = values[0];
    row[i + C::kDim / 2] = values[1];
  }
}

// The unit's columns, rotated, to the exchange, column by column over the warps.
template <class C>
__device__ __forceinline__ void stage_query(Exchange<C>& exchange, const Params& p,
                                            const Unit& unit, int warp, int lane) {
  constexpr int kMost = C::kColumns / kWarps;
  Head head[kMost] = {};
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int column = warp + i * kWarps;
    if (column >= unit.columns) continue;
    head[i] = load_head<typename C::T, C::kDim>(column_head<C>(p, unit, column), lane);
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int column = warp + i * kWarps;
    if (column < unit.columns && p.rotates()) {
      const int row = p.row_of(unit.column0 + column);
      norm_and_rotate<C::kDim>(head[i], p.args.rope.q_norm, p.args.rope.q_norm_eps,
                               load_rotation<C::kDim>(exchange.rotations[row], lane), lane);
    }
    store_query<C>(exchange.query[column], head[i], lane);
  }
}
// The lines that stage_query reads, on their way while the kernel before this one ends.
template <class C>
__device__ __forceinline__ void prefetch_query(const Params& p, const Unit& unit) {
  const int column = static_cast<int>(threadIdx.x) / 8;
  const int byte = static_cast<int>(threadIdx.x) % 8 * 128;
  if (column >= unit.columns || byte >= C::kDim * 2) return;
  prefetch_l2(reinterpret_cast<const char*>(column_head<C>(p, unit, column)) + byte);
}

// Columns of steps `step` and on as the n8 operand: a lane holds dims 2c, 2c + 1 and 2c + 8, 2c + 9 of
// column g.
template <class C>
__device__ __forceinline__ void load_columns(uint32_t (&q)[4], const Exchange<C>& exchange, int n,
                                             int step, int lane) {
  const uint32_t row = smem_address(exchange.query[n * 8 + lane % 8] + step * 16);
  if (step + 1 < C::kSteps) {
    ldmatrix_x4(q, row + lane / 8 * 16);
  } else {
    uint32_t one[2];
    ldmatrix_x2(one, row + lane / 8 % 2 * 16);
    q[0] = one[0];
    q[1] = one[1];
  }
}

// sum(q) of the columns, for this warp.
template <class C>
__device__ __forceinline__ void store_query_sums(Exchange<C>& exchange, int warp, int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    float sum = 0.0F;
#pragma unroll
    for (int step = 0; step < C::kSteps; step += 2) {
      uint32_t q[4];
      load_columns<C>(q, exchange, n, step, lane);
      sum = add_pair<typename C::Product>(add_pair<typename C::Product>(sum, q[0]), q[1]);
      if (step + 1 == C::kSteps) continue;
      sum = add_pair<typename C::Product>(add_pair<typename C::Product>(sum, q[2]), q[3]);
    }
    sum = quad_sum(sum);
    if (lane % 4 == 0) exchange.query_sums[warp][n * 8 + lane / 4] = sum;
  }
  __syncwarp();
}

}  // namespace turbomind::cuda::decode
