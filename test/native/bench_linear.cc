// Speed of the packed layers on the shapes of Qwen2.5-0.5B (AWQ, group 128): one JSON object on
// stdout. Usage: bench_linear [threads] [seconds per figure]. Weights of all 24 layers differ in
// memory, so they come from DRAM as in a decode step. Run on an idle machine; not a test.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "backend/cpu/mapped_memory.h"
#include "linear_fixture.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

constexpr int kLayers = 24;
constexpr int64_t kHidden = 896, kInner = 4864, kQkv = 1152, kVocab = 151936;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Median seconds of one call.
double time_of(const std::function<void()>& body, double budget) {
  body();
  std::vector<double> times;
  const double end = seconds_now() + budget;
  do {
    const double start = seconds_now();
    body();
    times.push_back(seconds_now() - start);
  } while (seconds_now() < end || times.size() < 3);
  std::nth_element(times.begin(), times.begin() + static_cast<long>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

// Best of several passes over 512 MB, each thread its own half.
double read_bandwidth(cpu::ThreadPool& pool) {
  const cpu::MappedMemory memory(size_t{512} << 20);
  std::memset(memory.data(), 1, memory.bytes());
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const double start = seconds_now();
    std::atomic<uint64_t> sink{0};
    pool.parallel_for(512, 4, [&](int64_t begin, int64_t end) {
      uint64_t sum[8] = {};
      const uint64_t* p = reinterpret_cast<const uint64_t*>(memory.data() + (begin << 20));
      const uint64_t* stop = reinterpret_cast<const uint64_t*>(memory.data() + (end << 20));
      for (; p < stop; p += 8) {
        _mm_prefetch(reinterpret_cast<const char*>(p) + 4096, _MM_HINT_T0);
        for (int i = 0; i < 8; ++i) sum[i] += p[i];
      }
      for (uint64_t s : sum) sink += s;
    });
    best = std::max(best, static_cast<double>(memory.bytes()) / (seconds_now() - start));
  }
  return best;
}

struct Awq {  // random bits, one source shared by all layers
  int64_t k, n;
  std::vector<int32_t> qweight, qzeros;
  std::vector<uint16_t> scales;
  Awq(std::mt19937& rng, int64_t k_, int64_t n_)
      : k(k_),
        n(n_),
        qweight(static_cast<size_t>(k_ * n_ / 8)),
        qzeros(static_cast<size_t>(k_ / 128 * n_ / 8)),
        scales(static_cast<size_t>(k_ / 128 * n_), to_f16(0.01F)) {
    for (int32_t& x : qweight) x = static_cast<int32_t>(rng());
    for (int32_t& x : qzeros) x = static_cast<int32_t>(rng());
  }
  LinearPart part() const {
    LinearPart p;
    p.kind = WeightKind::awq;
    p.out_features = n;
    p.qweight = {qweight.data(), DType::i32, {k, n / 8}};
    p.qzeros = {qzeros.data(), DType::i32, {k / 128, n / 8}};
    p.scales = {scales.data(), DType::f16, {k / 128, n}};
    return p;
  }
};

LinearSource source_of(std::vector<LinearPart> parts, int64_t k,
                       PartOrder order = PartOrder::concatenated) {
  LinearSource s;
  s.name = "bench";
  s.in_features = k;
  s.group_size = parts[0].kind == WeightKind::awq ? 128 : 0;
  s.order = order;
  s.parts = std::move(parts);
  return s;
}

struct Model {
  std::vector<std::unique_ptr<cpu::PackedLinear>> qkv, o, gate_up, down;
  double pack_seconds = 0;
  size_t bytes = 0;

  Model(const Awq& q, const Awq& out, const Awq& gate, const Awq& down_source, cpu::Isa isa,
        cpu::ThreadPool& pool) {
    const double start = seconds_now();
    for (int i = 0; i < kLayers; ++i) {
      qkv.push_back(cpu::pack_linear(source_of({q.part()}, kHidden), isa, pool));
      o.push_back(cpu::pack_linear(source_of({out.part()}, kHidden), isa, pool));
      gate_up.push_back(cpu::pack_linear(
          source_of({gate.part(), gate.part()}, kHidden, PartOrder::gate_up), isa, pool));
      down.push_back(cpu::pack_linear(source_of({down_source.part()}, kInner), isa, pool));
    }
    pack_seconds = seconds_now() - start;
    for (int i = 0; i < kLayers; ++i) {
      bytes += qkv[static_cast<size_t>(i)]->bytes() + o[static_cast<size_t>(i)]->bytes() +
               gate_up[static_cast<size_t>(i)]->bytes() + down[static_cast<size_t>(i)]->bytes();
    }
  }

  void step(const Norm& norm, std::vector<float>& x, std::vector<float>& wide, int64_t rows,
            void* scratch, cpu::ThreadPool& pool) const {
    for (size_t i = 0; i < kLayers; ++i) {
      qkv[i]->run({.x = x.data(), .y = wide.data(), .rows = rows, .norm = &norm}, scratch, pool);
      o[i]->run({.x = x.data(), .y = wide.data(), .rows = rows, .epilogue = Epilogue::residual},
                scratch, pool);
      gate_up[i]->run({.x = x.data(),
                       .y = wide.data(),
                       .rows = rows,
                       .norm = &norm,
                       .epilogue = Epilogue::silu_mul},
                      scratch, pool);
      down[i]->run({.x = wide.data(), .y = x.data(), .rows = rows, .epilogue = Epilogue::none},
                   scratch, pool);
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : cpu::usable_threads();
  const double budget = argc > 2 ? std::atof(argv[2]) : 0.4;
  cpu::ThreadPool pool(threads);
  std::mt19937 rng(1);
  const Awq q(rng, kHidden, kQkv), o(rng, kHidden, kHidden), gate(rng, kHidden, kInner),
      down(rng, kInner, kHidden);
  const std::vector<float> ones(kHidden, 1.0F);
  Norm norm;
  norm.weight = {ones.data(), DType::f32, {kHidden}};
  const double bandwidth = read_bandwidth(pool);
  std::printf("{\"threads\": %d, \"read_gb_s\": %.2f", threads, bandwidth / 1e9);
  const double macs =
      static_cast<double>(kLayers) * (kHidden * kQkv + kHidden * kHidden + 3 * kHidden * kInner);
  for (cpu::Isa isa : isas()) {
    if (isa == cpu::Isa::scalar) continue;
    const Model model(q, o, gate, down, isa, pool);
    std::printf(",\n \"%s\": {\"pack_s\": %.3f, \"mb\": %.1f", cpu::to_string(isa),
                model.pack_seconds, static_cast<double>(model.bytes) / 1e6);
    for (int64_t rows : {1, 2, 3, 4, 5, 8, 16, 32, 512}) {
      if (rows > 16 && isa == cpu::Isa::avx2) continue;
      std::vector<float> x = random_floats(rng, rows * kInner, 1.0F),
                         wide(static_cast<size_t>(rows * kInner));
      size_t bytes = 0;
      for (const auto& layer : {&model.down[0], &model.gate_up[0]})
        bytes = std::max(bytes, (*layer)->scratch_bytes(rows));
      const Scratch64 scratch(bytes);
      const double t =
          time_of([&] { model.step(norm, x, wide, rows, scratch.data, pool); }, budget);
      std::printf(
          ",\n   \"m%lld\": {\"ms\": %.2f, \"gb_s\": %.2f, \"of_read\": %.3f, \"gmac_s\": %.1f}",
          static_cast<long long>(rows), t * 1e3, static_cast<double>(model.bytes) / t / 1e9,
          static_cast<double>(model.bytes) / t / bandwidth,
          macs * static_cast<double>(rows) / t / 1e9);
      std::fflush(stdout);
    }
    std::printf("}");
  }
  {
    std::vector<uint16_t> table(static_cast<size_t>(kVocab * kHidden));
    for (uint16_t& w : table) {  // about normal: the sum of four bytes
      const uint32_t r = static_cast<uint32_t>(rng());
      const int sum =
          static_cast<int>((r & 255) + ((r >> 8) & 255) + ((r >> 16) & 255) + (r >> 24)) - 510;
      w = cpu::f32_to_bf16(static_cast<float>(sum) * 1e-4F);
    }
    LinearPart part;
    part.out_features = kVocab;
    part.weight = {table.data(), DType::bf16, {kVocab, kHidden}};
    const double start = seconds_now();
    const auto head = cpu::pack_head(source_of({part}, kHidden), cpu::best_isa(), pool);
    std::printf(",\n \"head\": {\"pack_s\": %.3f, \"mb\": %.1f", seconds_now() - start,
                static_cast<double>(head->bytes()) / 1e6);
    for (int64_t rows : {1, 4, 16}) {
      const std::vector<float> x = random_floats(rng, rows * kHidden, 1.0F);
      std::vector<float> scores(static_cast<size_t>(rows * kVocab));
      const Scratch64 scratch(head->scratch_bytes(rows));
      for (int k : {1, 50}) {
        const double t = time_of(
            [&] { head->best_logits(x.data(), rows, k, 0.0F, scores.data(), scratch.data, pool); },
            budget);
        const auto scored =
            std::count_if(scores.begin(), scores.end(), [](float s) { return s > -1e30F; });
        std::printf(",\n   \"m%lld_k%d\": {\"ms\": %.2f, \"of_read\": %.3f, \"rescored\": %.1f}",
                    static_cast<long long>(rows), k, t * 1e3,
                    static_cast<double>(head->bytes()) / t / bandwidth,
                    static_cast<double>(scored) / static_cast<double>(rows));
        std::fflush(stdout);
      }
    }
    std::printf("}");
  }
  {  // InternViT-300M's widest layer, 1025 rows a tile
    std::vector<uint16_t> w(4096 * 1024);
    for (uint16_t& v : w)
      v = cpu::f32_to_bf16(static_cast<float>(static_cast<int>(rng() & 255) - 128) * 1e-3F);
    std::printf(",\n \"bf16\": {");
    const struct {
      int64_t n, k;
    } shapes[] = {{4096, 1024}, {1024, 4096}, {3072, 1024}, {1024, 256}};
    const char* separator = "";
    for (const auto& s : shapes) {
      LinearPart part;
      part.out_features = s.n;
      part.weight = {w.data(), DType::bf16, {s.n, s.k}};
      const auto layer = cpu::pack_linear(source_of({part}, s.k), cpu::best_isa(), pool);
      const int64_t rows = 1025;
      const std::vector<float> x = random_floats(rng, rows * s.k, 1.0F);
      std::vector<float> y(static_cast<size_t>(rows * s.n));
      const Scratch64 scratch(layer->scratch_bytes(rows));
      const double t = time_of(
          [&] { layer->run({.x = x.data(), .y = y.data(), .rows = rows}, scratch.data, pool); },
          budget);
      std::printf("%s\n   \"n%lld_k%lld\": {\"ms\": %.2f, \"gmac_s\": %.1f}", separator,
                  static_cast<long long>(s.n), static_cast<long long>(s.k), t * 1e3,
                  static_cast<double>(rows * s.n * s.k) / t / 1e9);
      separator = ",";
    }
    std::printf("}");
  }
  std::printf("}\n");
  return 0;
}
