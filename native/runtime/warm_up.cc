#include "runtime/warm_up.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

namespace turbomind {
namespace {

// Decode steps are captured for lengths up to this, and for each doubling of it.
constexpr int kFirstSplit = 256;

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

// A step of one sequence that adds its token number `length`.
void run_decode_step(Decoder& decoder, KvCache& cache, int length) {
  const int block_size = cache.spec().block_size;
  std::vector<int32_t> blocks(static_cast<size_t>((length + block_size - 1) / block_size));
  std::iota(blocks.begin(), blocks.end(), 0);
  const std::array<TokenId, 1> ids{0};
  const std::array<int32_t, 1> last{length - 1};
  const std::array<int32_t, 2> query_start{0, 1};
  const std::array<int32_t, 1> kv_len{length};
  const std::array<int32_t, 1> sampled{0};
  decoder.forward({.token_ids = ids,
                   .positions = last,
                   .slots = last,
                   .query_start = query_start,
                   .kv_len = kv_len,
                   .block_table = blocks,
                   .max_blocks = static_cast<int>(blocks.size()),
                   .sample_rows = sampled},
                  cache);
  const SamplingParams greedy;
  const SampleRow row{.params = &greedy, .tokens = ids};
  SampleResult result;
  decoder.sample({&row, 1}, {&result, 1});
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
  for (int length = 1; length <= room; length = length == 1 ? kFirstSplit + 1 : 2 * length - 1) {
    run_decode_step(decoder, cache, length);
  }
  if (vision != nullptr) {
    const int64_t side = vision->spec().image_size;
    const std::vector<uint8_t> pixels(static_cast<size_t>(3 * side * side), 0);
    vision->encode(ConstTensorView(pixels.data(), DType::u8, {1, side, side, 3}), embeddings);
  }
  backend.synchronize();
}

}  // namespace turbomind
