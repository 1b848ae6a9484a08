// Attention of one new token a sequence over its paged keys. Work item: 256 keys (four KV blocks) of
// one sequence; CTA: an item and one KV head, whose up to 16 query heads fill the m16 rows. Each of
// the four warps takes one block, in kernel tiles of 16 keys with a ring of its own, so that the
// loop needs no CTA barrier. The warps' results meet in shared memory and the items' in L2, where
// the CTA that comes last adds them in order: the result depends on the sequence's length alone.
// Bound: HBM, K and V read once for all query heads of the group.
#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kWarps = kSplitTokens / kBlockTokens;
constexpr int kThreads = kWarps * 32;
constexpr int kTokens = 16;  // of a kernel tile
constexpr int kStages = 2;
constexpr int kRows = 16;  // query heads a CTA

struct Params {
  DecodeAttentionArgs args;
  int group;        // query heads a KV head
  int head_groups;  // CTAs a KV head: ceil(group / 16)
  float scale_log2;
};

template <class T, int kDim>
__device__ __forceinline__ void load_tile(uint32_t destination, const T* source, int valid,
                                          int lane) {
  constexpr int kPieces = kDim / 8;
#pragma unroll
  for (int i = lane; i < kTokens * kPieces; i += 32) {
    const int token = i / kPieces;
    const int piece = i % kPieces;
    const bool inside = token < valid;
    cp_async_16(destination + token * kFlashRowBytes<kDim> + piece * 16,
                source + (inside ? token : 0) * kDim + piece * 8, inside);
  }
}

// One warp: its block of the item, or nothing.
template <class T, int kDim>
__device__ __forceinline__ void attend_block(FlashState<kDim>& state,
                                             const uint32_t (&query)[kDim / 16][4], const T* keys,
                                             const T* values, int valid, uint32_t ring,
                                             float scale_log2, int lane) {
  constexpr int kTileBytes = kTokens * kFlashRowBytes<kDim>;
  const int tiles = (valid + kTokens - 1) / kTokens;
  const auto load = [&](int tile) {
    const uint32_t stage = ring + (tile % kStages) * 2 * kTileBytes;
    const int rest = valid - tile * kTokens;
    if (tile < tiles) {
      load_tile<T, kDim>(stage, keys + tile * kTokens * kDim, rest, lane);
      load_tile<T, kDim>(stage + kTileBytes, values + tile * kTokens * kDim, rest, lane);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages; ++i) load(i);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 1>();
    __syncwarp();
    const int rest = valid - tile * kTokens;
    const int limit[2] = {rest, rest};
    const uint32_t stage = ring + (tile % kStages) * 2 * kTileBytes;
    flash_tile<T, kDim, kTokens>(state, query, stage, stage + kTileBytes, limit, rest < kTokens,
                                 scale_log2, lane);
    __syncwarp();
    load(tile + kStages);
  }
  cp_async_wait<0>();
}

// Adds parts in order: part i has maximum and sum ml(i) and unnormalised output out(i).
template <class MaxSum, class Out>
__device__ __forceinline__ float3 merge_parts(int parts, float scale_log2, MaxSum&& ml, Out&& out) {
  float largest = -INFINITY;
  for (int i = 0; i < parts; ++i) largest = fmaxf(largest, ml(i).x);
  float sum = 0.0F;
  float total = 0.0F;
  for (int i = 0; i < parts; ++i) {
    const float2 part = ml(i);
    const float factor = part.x == -INFINITY ? 0.0F : fast_exp2((part.x - largest) * scale_log2);
    sum = fmaf(part.y, factor, sum);
    total = fmaf(out(i), factor, total);
  }
  return {largest, sum, total};
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) decode_kernel(const Params p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ float2 warp_max_sum[kWarps][kRows];
  __shared__ bool last;
  constexpr int kRingBytes = kStages * 2 * kTokens * kFlashRowBytes<kDim>;
  static_assert(kWarps * kRingBytes >= kWarps * kRows * kDim * 4, "outputs reuse the rings");
  grid_dependency_wait();
  grid_dependency_launch();
  const DecodeAttentionArgs& a = p.args;
  const int2 item = a.step.decode_items[blockIdx.x];
  const int sequence = item.x;
  if (sequence < 0) return;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int kv_head = blockIdx.y / p.head_groups;
  const int group0 = blockIdx.y % p.head_groups * kRows;  // first query head within the group
  const int heads = min(kRows, p.group - group0);
  const int head0 = kv_head * p.group + group0;
  const int num_keys = a.step.kv_len[sequence];
  const int64_t row = a.step.query_start[sequence];

  // this warp's block
  const int block_idx = item.y * kWarps + warp;
  const int valid = min(kBlockTokens, max(0, num_keys - block_idx * kBlockTokens));
  const T* q =
      static_cast<const T*>(a.qkv) + (row * (a.num_heads + 2 * a.num_kv_heads) + head0) * kDim;
  uint32_t query[kDim / 16][4];
  load_query<T, kDim>(query, lane / 4 < heads ? q + (lane / 4) * kDim : nullptr,
                      lane / 4 + 8 < heads ? q + (lane / 4 + 8) * kDim : nullptr, lane);
  FlashState<kDim> state;
  if (valid > 0) {
    const int64_t block = a.step.block_table[sequence * *a.step.block_stride + block_idx];
    const int64_t offset = (block * a.num_kv_heads + kv_head) * kBlockTokens * kDim;
    attend_block<T, kDim>(state, query, static_cast<const T*>(a.k_cache) + offset,
                          static_cast<const T*>(a.v_cache) + offset, valid,
                          smem_address(shared) + warp * kRingBytes, p.scale_log2, lane);
  }

  // warps → item, in order
  __syncthreads();
  float* outputs = reinterpret_cast<float*>(shared);  // [kWarps][kRows][kDim]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int head = lane / 4 + 8 * r;
    const float sum = quad_sum(state.row_sum[r]);
    if (lane % 4 == 0) warp_max_sum[warp][head] = {state.row_max[r], sum};
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      float* cell = outputs + (warp * kRows + head) * kDim + d * 8 + (lane % 4) * 2;
      cell[0] = state.out[d][2 * r];
      cell[1] = state.out[d][2 * r + 1];
    }
  }
  __syncthreads();
  const int splits = (num_keys + kSplitTokens - 1) / kSplitTokens;
  T* y = static_cast<T*>(a.y) + (row * a.num_heads + head0) * kDim;
  for (int i = threadIdx.x; i < heads * kDim; i += kThreads) {
    const int head = i / kDim;
    const float3 merged = merge_parts(
        kWarps, p.scale_log2, [&](int w) { return warp_max_sum[w][head]; },
        [&](int w) { return outputs[w * kRows * kDim + i]; });
    if (splits == 1) {
      y[i] = from_float<T>(merged.z / merged.y);
      continue;
    }
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * a.num_heads + head0;
    __stcg(a.partial_out + slot * kDim + i, merged.z);
    if (i % kDim == 0) __stcg(a.partial_max_sum + slot + head, make_float2(merged.x, merged.y));
  }
  if (splits == 1) return;

  // items → sequence, in order, by the CTA that comes last
  __syncthreads();
  uint32_t* ticket = a.tickets + static_cast<int64_t>(sequence) * gridDim.y + blockIdx.y;
  if (threadIdx.x ==
      0) {  // its fences cover what the CTA wrote before, and reads after, the barriers
    __threadfence();
    last = atomicAdd(ticket, 1U) == static_cast<uint32_t>(splits) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const int64_t first = static_cast<int64_t>(a.step.split_start[sequence]) * a.num_heads + head0;
  for (int i = threadIdx.x; i < heads * kDim; i += kThreads) {
    const float3 merged = merge_parts(
        splits, p.scale_log2,
        [&](int s) {
          return __ldcg(a.partial_max_sum + first + static_cast<int64_t>(s) * a.num_heads +
                        i / kDim);
        },
        [&](int s) {
          return __ldcg(a.partial_out + (first + static_cast<int64_t>(s) * a.num_heads) * kDim + i);
        });
    y[i] = from_float<T>(merged.z / merged.y);
  }
  if (threadIdx.x == 0) *ticket = 0;
}

}  // namespace

void decode_attention(const LaunchContext& context, DType dtype, const DecodeAttentionArgs& args) {
  if (args.num_items == 0) return;
  const int group = args.num_heads / args.num_kv_heads;
  const int head_groups = ceil_div(group, kRows);
  const Params params{args, group, head_groups, args.softmax_scale * 1.4426950408889634F};
  visit_dtype(dtype, [&]<class T>() {
    visit_head_dim(args.head_dim, [&]<int kDim>() {
      launch(decode_kernel<T, kDim>,
             {.grid = dim3(static_cast<unsigned>(args.num_items),
                           static_cast<unsigned>(args.num_kv_heads * head_groups)),
              .threads = kThreads,
              .shared_bytes = kWarps * kStages * 2 * kTokens * kFlashRowBytes<kDim>},
             context.stream, context.programmatic, params);
    });
  });
}

}  // namespace turbomind::cuda
