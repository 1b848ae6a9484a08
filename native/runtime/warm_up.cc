#include "runtime/warm_up.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

namespace turbomind {
namespace {

// One sequence of `tokens` tokens whose last `rows` are sampled.
void run_step(Decoder& decoder, KvCache& cache, int tokens, int rows) {
  const int block_size = cache.spec().block_size;
  const auto count = static_cast<size_t>(tokens);
  const std::vector<TokenId> ids(count, 0);
  std::vector<int32_t> positions(count);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<int32_t> blocks(static_cast<size_t>((tokens + block_size - 1) / block_size));
  std::iota(blocks.begin(), blocks.end(), 0);
  const std::array<int32_t, 2> query_start{0, tokens};
  const std::array<int32_t, 1> kv_len{tokens};
  std::vector<int32_t> sampled(static_cast<size_t>(rows));
  std::iota(sampled.begin(), sampled.end(), tokens - rows);
  const StepBatch batch{.token_ids = ids,
                        .positions = positions,
                        .slots = positions,  // the blocks lie one behind the other
                        .query_start = query_start,
                        .kv_len = kv_len,
                        .block_table = blocks,
                        .max_blocks = static_cast<int>(blocks.size()),
                        .sample_rows = sampled};
  SamplingParams drawn;
  drawn.do_sample = true;
  const SamplingParams greedy;
  std::vector<SampleRow> wanted(sampled.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    wanted[i] = {.params = i % 2 == 0 ? &greedy : &drawn, .tokens = ids};
  }
  std::vector<SampleResult> results(wanted.size());
  decoder.warm_up(batch, cache, wanted, results);
}

}  // namespace

void warm_up(Backend& backend, Decoder& decoder, KvCache& cache, const MemoryPlan& plan,
             VisionTower* vision, TensorView embeddings) {
  const int room = std::min(plan.num_blocks, plan.blocks_per_session) * cache.spec().block_size;
  const int most = std::min(room, plan.max_tokens);
  for (int tokens = 1; tokens <= most;
       tokens = tokens == most ? most + 1 : std::min(2 * tokens, most)) {
    run_step(decoder, cache, tokens, std::min(tokens, plan.max_rows));
  }
  if (vision != nullptr) {
    const int64_t side = vision->spec().image_size;
    const std::vector<uint8_t> pixels(static_cast<size_t>(3 * side * side), 0);
    vision->encode(ConstTensorView(pixels.data(), DType::u8, {1, side, side, 3}), embeddings);
  }
  backend.synchronize();
}

}  // namespace turbomind
