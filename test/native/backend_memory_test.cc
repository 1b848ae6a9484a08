// The sizes that backends answer before anything is allocated against what they then take, and
// whole KV blocks copied, saved and loaded.
#include <cstring>
#include <numeric>

#include "backend/cpu/cpu_backend.h"
#include "each_backend.h"
#include "linear_fixture.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;
using cpu::CpuBackend;

namespace {

// Fills all blocks of a cache with bytes that tell block and place, through load_blocks.
std::vector<char> numbered_blocks(Backend& backend, KvCache& cache) {
  const size_t bytes = backend.kv_block_bytes(cache.spec());
  std::vector<char> host(bytes * static_cast<size_t>(cache.spec().num_blocks));
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<char>(i / bytes * 31 + i % 29);
  std::vector<BlockId> all(static_cast<size_t>(cache.spec().num_blocks));
  std::iota(all.begin(), all.end(), 0);
  backend.load_blocks(cache, all, host.data());
  return host;
}

}  // namespace

TEST("blocks are copied, saved and loaded whole, and nothing else changes") {
  for_each_backend([](Backend& backend, const Tolerance&) {
    const auto cache = backend.make_kv_cache(
        {.num_layers = 3, .num_kv_heads = 2, .head_dim = 64, .block_size = 16, .num_blocks = 7});
    const size_t bytes = backend.kv_block_bytes(cache->spec());
    std::vector<char> want = numbered_blocks(backend, *cache);
    const std::pair<BlockId, BlockId> pairs[] = {{2, 5}, {2, 0}, {6, 3}};
    backend.copy_blocks(*cache, pairs);
    for (const auto& [from, to] : pairs) {
      std::copy_n(want.begin() + static_cast<int64_t>(from * bytes), bytes,
                  want.begin() + static_cast<int64_t>(to * bytes));
    }
    const std::unique_ptr<Buffer> host = backend.allocate_host(3 * bytes);
    const BlockId saved[] = {5, 1, 3};
    backend.save_blocks(*cache, saved, host->data());
    backend.synchronize();
    for (int i = 0; i < 3; ++i) {
      EXPECT(std::memcmp(static_cast<char*>(host->data()) + i * bytes,
                         want.data() + saved[i] * bytes, bytes) == 0);
    }
    const BlockId restored[] = {4, 6, 2};
    backend.load_blocks(*cache, restored, host->data());
    for (int i = 0; i < 3; ++i) {
      std::copy_n(static_cast<char*>(host->data()) + i * bytes, bytes,
                  want.begin() + static_cast<int64_t>(restored[i] * bytes));
    }
    std::vector<char> got(want.size());
    const BlockId all[] = {0, 1, 2, 3, 4, 5, 6};
    backend.save_blocks(*cache, all, got.data());
    backend.synchronize();
    EXPECT(got == want);
  });
}

TEST("a block that the cache does not have is refused") {
  CpuBackend backend({.threads = 1, .isa = ""});
  const auto cache = backend.make_kv_cache(
      {.num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .block_size = 16, .num_blocks = 2});
  std::vector<char> host(backend.kv_block_bytes(cache->spec()));
  const BlockId past[] = {2};
  const std::pair<BlockId, BlockId> onto_itself[] = {{1, 1}};
  EXPECT_ERROR(backend.save_blocks(*cache, past, host.data()), ErrorCode::internal);
  EXPECT_ERROR(backend.load_blocks(*cache, past, host.data()), ErrorCode::internal);
  EXPECT_ERROR(backend.copy_blocks(*cache, onto_itself), ErrorCode::internal);
}

TEST("what is allocated is counted while it lives, and the workspace takes what it said") {
  CpuBackend backend({.threads = 2, .isa = ""});
  EXPECT_EQ(backend.allocated_bytes(), size_t{0});
  {
    const KvCacheSpec spec{
        .num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .block_size = 64, .num_blocks = 3};
    const auto buffer = backend.allocate(1000);
    const auto cache = backend.make_kv_cache(spec);
    EXPECT_EQ(backend.allocated_bytes(), 1000 + 3 * backend.kv_block_bytes(spec));
  }
  EXPECT_EQ(backend.allocated_bytes(), size_t{0});
  const Backend::WorkspaceSpec spec{.max_tokens = 70,
                                    .max_sequences = 5,
                                    .max_rows = 5,
                                    .max_in_features = 256,
                                    .max_out_features = 512,
                                    .vocab_size = 1000,
                                    .max_kv_len = 300,
                                    .max_heads = 4,
                                    .max_head_dim = 64,
                                    .hidden_size = 128,
                                    .vision_tile_tokens = 65,
                                    .vision_head_dim = 64};
  const WorkspaceBytes planned = backend.workspace_bytes(spec);
  EXPECT(planned.scratch > 0 && planned.sampling > 0);
  EXPECT(backend.reserve_workspace(spec) == planned);
  EXPECT_EQ(backend.allocated_bytes(), planned.device_bytes());
}

TEST("a packed weight takes the bytes that were promised for it") {
  std::mt19937 rng(5);
  for (const std::string& isa : cpu_isas()) {
    CpuBackend backend({.threads = 2, .isa = isa});
    const auto expect_promise = [&](const LinearSource& source, WeightUse use) {
      const size_t before = backend.allocated_bytes();
      const size_t promised = backend.weight_bytes(source, use);
      const auto weight =
          use == WeightUse::linear ? backend.load_linear(source) : backend.load_head(source);
      EXPECT_EQ(weight->bytes(), promised);
      EXPECT_EQ(backend.allocated_bytes() - before, promised);
    };
    for (DType scales : {DType::f16, DType::f32}) {
      const AwqPart a(rng, 128, 24, 64, scales, true);
      const AwqPart b(rng, 128, 24, 64, scales, false);
      expect_promise(awq_source({a, b}), WeightUse::linear);
      expect_promise(awq_source({a, b}, PartOrder::gate_up), WeightUse::linear);
    }
    for (DType type : {DType::f32, DType::f16, DType::bf16}) {
      for (const auto& [n, k] : {std::pair<int64_t, int64_t>{40, 75}, {33, 64}, {20000, 250}}) {
        const FloatArray weight(type, random_floats(rng, n * k, 0.1F));
        LinearPart part;
        part.out_features = n;
        part.weight = {weight.data(), type, {n, k}};
        LinearSource source;
        source.name = "test.layer";
        source.in_features = k;
        source.parts = {part};
        if (n < 1000) expect_promise(source, WeightUse::linear);
        expect_promise(source, WeightUse::head);
        EXPECT_EQ(backend.weight_bytes(source, WeightUse::embedding), size_t{0});
      }
    }
  }
}

TEST("scratch bounds hold for every layer of that many features") {
  std::mt19937 rng(6);
  for (const cpu::Isa isa : isas()) {
    cpu::ThreadPool pool(1);
    for (int group : {32, 64, 128}) {
      const AwqPart part(rng, 256, 16, group, DType::f16, false);
      const auto layer = cpu::pack_linear(awq_source({part}), isa, pool);
      for (int64_t rows : {1, 17, 300}) {
        EXPECT(layer->scratch_bytes(rows) <= cpu::linear_scratch_bound(rows, 256));
        EXPECT(layer->scratch_bytes(rows) <= cpu::linear_scratch_bound(rows, 1000));
      }
    }
  }
}

TEST_MAIN()
