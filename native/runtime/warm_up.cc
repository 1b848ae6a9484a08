#include "runtime/warm_up.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

namespace turbomind {
namespace {

// Decode steps are captured for lengths up to this, and for each doubling of it.
constexpr int kFirstSplit = 256;

std::vector<int32_t> counted(int first, int count) {
  std::vector<int32_t> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

// A step of one sequence that has `length` tokens after it, the last `tokens` of them new and the last
// `rows` sampled.
struct LoneStep {
  std::vector<TokenId> ids;
  std::vector<int32_t> positions;  // also the slots: the blocks lie one behind the other
  std::vector<int32_t> blocks;
  std::vector<int32_t> sampled;
  std::array<int32_t, 2> query_start;
  std::array<int32_t, 1> kv_len;

  LoneStep(const KvCache& cache, int length, int tokens, int rows)
      : ids(static_cast<size_t>(tokens), 0),
        positions(counted(length - tokens, tokens)),
        blocks(counted(0, (length + cache.spec().block_size - 1) / cache.spec().block_size)),
        sampled(counted(tokens - rows, rows)),
        query_start{0, tokens},
        kv_len{length} {}

  StepBatch batch() const {
    return {.token_ids = ids,
            .positions = positions,
            .slots = positions,
            .query_start = query_start,
            .kv_len = kv_len,
            .block_table = blocks,
            .max_blocks = static_cast<int>(blocks.size()),
            .sample_rows = sampled};
  }
};

// A whole prompt of `tokens` tokens, through one layer.
void run_prompt(Decoder& decoder, KvCache& cache, int tokens, int rows) {
  const LoneStep step(cache, tokens, tokens, rows);
  SamplingParams drawn;
  drawn.do_sample = true;
  const SamplingParams greedy;
  std::vector<SampleRow> wanted(step.sampled.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    wanted[i] = {.params = i % 2 == 0 ? &greedy : &drawn, .tokens = step.ids, .banned = {}};
  }
  std::vector<SampleResult> results(wanted.size());
  decoder.warm_up(step.batch(), cache, wanted, results);
}

// The decode step that adds token number `length`.
void run_decode_step(Decoder& decoder, KvCache& cache, int length) {
  const LoneStep step(cache, length, 1, 1);
  decoder.forward(step.batch(), cache);
  const SamplingParams greedy;
  const SampleRow row{.params = &greedy, .tokens = step.ids, .banned = {}};
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
    run_prompt(decoder, cache, tokens, std::min(tokens, plan.max_rows));
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
