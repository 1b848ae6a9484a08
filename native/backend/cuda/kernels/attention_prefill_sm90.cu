// Attention of many query rows on wgmma, by the definition in flash.cuh: causal over paged keys, or over
// all keys of a vision tile. CTA: 128 query rows of one head in two consumer warpgroups of 64 (vision
// heads of 64: 192 in three), and a producer warpgroup that keeps a ring of KV tiles full. A CTA has one
// such set of rows; in the vision tower all it can take.
// Bound: tensor cores. Same bits as the mma.sync kernels.
#include "backend/cuda/device/prefill_consume_sm90.cuh"
#include "backend/cuda/device/prefill_produce_sm90.cuh"
#include "backend/cuda/gemm/tensor_map.h"
#include "backend/cuda/kernels/attention_prefill.h"

namespace turbomind::cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    prefill_sm90_kernel(const PrefillParams p, const PrefillItems items, const int num_stages,
                        const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t barriers[2 * kMaxPrefillStages + 4];
  __shared__ PrefillWork work[2];
  PrefillRing ring;
  ring.num_stages = num_stages;
  ring.query = smem_address(shared);
  ring.stages = ring.query + C::kQueryBytes;
  ring.packed = ring.stages + num_stages * C::kStageBytes;
  ring.full = smem_address(barriers);
  ring.empty = ring.full + kMaxPrefillStages * 8;
  ring.query_full = ring.empty + kMaxPrefillStages * 8;
  ring.query_empty = ring.query_full + 8;
  ring.packed_full = ring.query_empty + 8;
  ring.work = work;
  if (threadIdx.x == 0) {
    for (int i = 0; i < num_stages; ++i) {
      mbarrier_init(ring.full + i * 8, C::kFullArrivals);
      mbarrier_init(ring.empty + i * 8, C::kGroups * 4 * kWarpArrivals);
    }
    mbarrier_init(ring.query_full, 1);
    mbarrier_init(ring.query_empty, C::kGroups * 4 * kWarpArrivals);
    for (int i = 0; i < 2; ++i) mbarrier_init(ring.packed_full + i * 8, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_dependency_wait();
  grid_dependency_launch();
  PrefillWork only{.sequence = -1};
  if constexpr (!C::kPersistent) {  // longest rows first
    only = find_prefill_work<true, C::kRows>(p, blockIdx.x, gridDim.y - 1 - blockIdx.y, 0);
    if (only.sequence < 0) return;
  }
  const int group = threadIdx.x / 128;
  if (group == C::kGroups) {
    give_registers<C::kProducerRegisters>();
    produce<C>(p, items, ring, only, &map);
  } else {
    take_registers<C::kConsumerRegisters>();
    PrefillConsumer<C> consumer(ring, only, p.scale_log2, group);
    bool more = consumer.next();
    while (more) {
      consumer.run();
      consumer.store(p);
      more = C::kPersistent && consumer.next();
    }
  }
}

template <class C>
void start(const LaunchContext& context, const PrefillParams& params, const PrefillItems& items,
           const CUtensorMap& map) {
  const int fixed = C::kQueryBytes + C::kPackedSlots * C::kPackedSlot;
  const int stages =
      std::min(kMaxPrefillStages, (context.max_shared_bytes - 1024 - fixed) / C::kStageBytes);
  TM_CHECK(stages >= 2, "%d bytes of shared memory are too few for prefill attention",
           context.max_shared_bytes);
  dim3 grid(static_cast<unsigned>(items.heads), static_cast<unsigned>(items.query_tiles));
  if (C::kPersistent) grid = dim3(static_cast<unsigned>(std::min(context.num_sms, items.count())));
  launch(prefill_sm90_kernel<C>,
         {.grid = grid, .threads = C::kThreads, .shared_bytes = fixed + stages * C::kStageBytes},
         context.stream, context.programmatic, params, items, stages, map);
}

// Calls f with a head dimension that this kernel has.
template <class F>
void visit_wide_dim(int head_dim, F&& f) {
  if (head_dim == 64) return f.template operator()<64>();
  f.template operator()<128>();
}

}  // namespace

bool has_prefill_sm90(int head_dim) { return head_dim == 64 || head_dim == 128; }

void prefill_attention_sm90(const LaunchContext& context, DType dtype,
                            const PrefillAttentionArgs& args) {
  const PrefillParams params = prefill_params(args);
  const CUtensorMap map =
      make_tensor_map(args.qkv, dtype, args.tokens, params.ldq, params.ldq, kBlockTokens, 64);
  const PrefillItems items{args.num_heads, args.num_tiles, 1};
  visit_dtype(dtype, [&]<class T>() {
    visit_wide_dim(args.head_dim, [&]<int kDim>() {
      visit_kv_bits(args.kv_bits, [&]<int kBits>() {
        using C = PrefillConfig<T, kDim, kBits, true>;
        static_assert(C::kRows == kQueryTile);
        start<C>(context, params, items, map);
      });
    });
  });
}

void tile_attention_sm90(const LaunchContext& context, DType dtype, const TileAttentionArgs& args) {
  const PrefillParams params = prefill_params(args);
  const CUtensorMap map =
      make_tensor_map(args.qkv, dtype, static_cast<int64_t>(args.num_tiles) * args.tokens,
                      params.ldq, params.ldq, kBlockTokens, 64);
  visit_dtype(dtype, [&]<class T>() {
    visit_wide_dim(args.head_dim, [&]<int kDim>() {
      using C = PrefillConfig<T, kDim, 16, false>;
      const PrefillItems items{args.num_heads, ceil_div(args.tokens, C::kRows), args.num_tiles};
      start<C>(context, params, items, map);
    });
  });
}

}  // namespace turbomind::cuda
