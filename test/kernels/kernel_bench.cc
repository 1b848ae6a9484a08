// Times each kernel at the shapes of Qwen2.5-32B and InternVL2.5-4B and writes one JSON document.
// Every launch uses the next of several copies of its weights (more than twice the L2 in all); the
// launches are captured in one graph; figures are medians of nine replays. Ceilings are measured in
// the same run. Usage: kernel_bench OUT.json [quick | decode | drafts | prefill | vision | layers | segments]
#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "backend/cuda/cuda_sampler.h"
#include "backend/cuda/gemm/gemm_table.h"
#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/split_norms.h"
#include "gpu_test.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda;
using namespace turbomind::cuda::testing;

const std::set<std::string> kAttentionParts = {"decode", "drafts", "prefill", "vision"};

struct Report {
  std::string json = "[\n";
  double copy_tbs = 0;
  void add(const std::string& kernel, const std::string& shape, double us, double bytes, double flops) {
    const double tbs = bytes / us * 1e-6;
    const std::string line = format(
        "  {\"kernel\": \"%s\", \"shape\": \"%s\", \"us\": %.2f, \"tb_s\": %.3f, \"copy_share\": %.3f, \"tflop_s\": %.1f}",
        kernel.c_str(), shape.c_str(), us, tbs, copy_tbs > 0 ? tbs / copy_tbs : 0.0, flops / us * 1e-6);
    std::printf("%-16s %-44s %9.2f us %7.3f TB/s %5.1f%% %8.1f TFLOP/s\n", kernel.c_str(), shape.c_str(), us, tbs,
                copy_tbs > 0 ? 100 * tbs / copy_tbs : 0.0, flops / us * 1e-6);
    std::fflush(stdout);
    json += line + ",\n";
  }
  void write(const char* path) const { std::ofstream(path) << json.substr(0, json.size() - 2) << "\n]\n"; }
};

CudaStream stream() {
  static CudaStream s = [] {
    CudaStream created = nullptr;
    cuda_check(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking));
    return created;
  }();
  return s;
}

// Microseconds of one of `launches` launches in a graph.
double time_us(int launches, const std::function<void(int)>& body) {
  cuda_check(cudaStreamSynchronize(stream()));
  cuda_check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) body(i);
  cudaGraph_t graph = nullptr;
  cuda_check(cudaStreamEndCapture(stream(), &graph));
  cudaGraphExec_t executable = nullptr;
  cuda_check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  cuda_check(cudaEventCreate(&begin));
  cuda_check(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < 11; ++i) {
    cuda_check(cudaEventRecord(begin, stream()));
    cuda_check(cudaGraphLaunch(executable, stream()));
    cuda_check(cudaEventRecord(end, stream()));
    cuda_check(cudaEventSynchronize(end));
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms * 1e3 / launches);
  }
  cuda_check(cudaGraphExecDestroy(executable));
  cuda_check(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Random bits that are small finite numbers as bf16, f16 and f16 scales alike.
void fill_random(void* device, size_t bytes, bool any_bits) {
  static std::vector<uint16_t> pool[2];
  std::vector<uint16_t>& source = pool[any_bits ? 1 : 0];
  if (source.empty()) {
    Random random(1);
    source.resize(size_t{8} << 20);
    for (uint16_t& value : source) value = any_bits ? static_cast<uint16_t>(random.bits()) : to_bits(random.normal(0.05F), DType::bf16);
  }
  for (size_t done = 0; done < bytes; done += source.size() * 2) {
    cuda_check(cudaMemcpy(static_cast<char*>(device) + done, source.data(), std::min(bytes - done, source.size() * 2), cudaMemcpyHostToDevice));
  }
}

struct Matrices {
  std::vector<PackedMatrix> copies;
  std::vector<std::unique_ptr<DeviceArray<char>>> storage;
  double bytes = 0;
};

Matrices make_matrices(WeightKind kind, int n, int k, bool gate_up, size_t total_bytes = size_t{300} << 20, size_t most = 64) {
  Matrices all;
  PackedMatrix m;
  m.kind = kind;
  m.dtype = DType::bf16;
  m.n = n;
  m.k = k;
  m.n_padded = round_up(n, kPackRows);
  m.k_padded = round_up(k, kind == WeightKind::awq ? kChunkColumns : kPackColumns);
  m.group_size = kind == WeightKind::awq ? 128 : 0;
  m.gate_up = gate_up;
  m.segments = choose_segments(kind, n, k);
  const size_t bytes = static_cast<size_t>(m.n_padded * m.k_padded) * (kind == WeightKind::awq ? 1 : 4) / 2;
  const size_t meta = kind == WeightKind::awq ? static_cast<size_t>(m.n_padded * (m.k_padded / 128)) * 4 : 0;
  all.bytes = static_cast<double>(bytes + meta);
  const size_t count = std::clamp<size_t>(total_bytes / (bytes + meta) + 1, 2, most);
  for (size_t i = 0; i < count; ++i) {
    all.storage.push_back(std::make_unique<DeviceArray<char>>(bytes));
    fill_random(all.storage.back()->get(), bytes, kind == WeightKind::awq);
    m.weights = all.storage.back()->get();
    if (meta > 0) {
      std::vector<uint32_t> words(meta / 4);
      Random random(static_cast<uint32_t>(i));
      for (uint32_t& word : words) word = to_bits(0.64F, DType::bf16) | static_cast<uint32_t>(to_bits(static_cast<float>(random.bits() & 15U) / -64.0F, DType::bf16)) << 16;
      all.storage.push_back(std::make_unique<DeviceArray<char>>(meta));
      cuda_check(cudaMemcpy(all.storage.back()->get(), words.data(), meta, cudaMemcpyHostToDevice));
      m.meta = reinterpret_cast<const uint32_t*>(all.storage.back()->get());
    }
    all.copies.push_back(m);
  }
  return all;
}

struct Scratch {
  DeviceArray<float> partials{size_t{8} << 20};
  DeviceArray<uint32_t> tickets{4096};
  Scratch() { tickets.zero(); }
};

GemmArgs gemm_args(const PackedMatrix& w, const void* x, int m, void* y, Epilogue epilogue, bool f32, Scratch& scratch) {
  return {.w = &w, .x = x, .ldx = w.k, .m = m, .y = y, .ldy = epilogue == Epilogue::silu_mul ? w.n / 2 : w.n,
          .y_is_f32 = f32, .epilogue = epilogue, .partials = scratch.partials.get(),
          .partial_floats = scratch.partials.size(), .tickets = scratch.tickets.get(), .num_tickets = scratch.tickets.size()};
}

void bench_gemm(Report& report, const LaunchContext& context, Scratch& scratch, WeightKind kind, const char* label, int n,
                int k, Epilogue epilogue, const std::vector<int>& tokens, bool f32 = false) {
  const Matrices matrices = make_matrices(kind, n, k, epilogue == Epilogue::silu_mul);
  const int most = *std::max_element(tokens.begin(), tokens.end());
  const DeviceArray<char> x(static_cast<size_t>(most) * k * 2);
  fill_random(x.get(), x.size(), false);
  const DeviceArray<char> y(static_cast<size_t>(most) * n * (f32 ? 4 : 2));
  fill_random(y.get(), y.size(), false);
  for (const GemmKernel& row : gemm_table()) {
    const GemmArgs probe = gemm_args(matrices.copies[0], x.get(), 1, y.get(), epilogue, f32, scratch);
    if (row.name == "naive" || context.sm < row.min_sm || context.sm > row.max_sm || !row.supports(probe, context)) continue;
    for (int m : tokens) {
      const double flops = 2.0 * m * n * k;
      const int launches = flops > 5e11 ? 3 : static_cast<int>(std::max<size_t>(matrices.copies.size(), 12));
      const double us = time_us(launches, [&](int i) {
        row.run(gemm_args(matrices.copies[static_cast<size_t>(i) % matrices.copies.size()], x.get(), m, y.get(), epilogue, f32, scratch), context);
      });
      const double io = 2.0 * m * k + static_cast<double>(m) * n * (f32 ? 4 : epilogue == Epilogue::silu_mul ? 1 : 2);
      report.add(std::string(row.name), format("%s M=%d", label, m), us, matrices.bytes + io, flops);
    }
  }
}

// What results that do not depend on M cost: the four products of a layer with the segments of K that the library
// gives each shape, and with those that are fastest at each M. The kernels are those that the library picks.
void bench_segments(Report& report, const LaunchContext& context, Scratch& scratch, const char* label, int hidden, int q, int kv, int mlp) {
  struct Product {
    const char* name;
    int n, k;
    Epilogue epilogue;
  };
  const Product products[] = {{"qkv", (q + 2 * kv) * 128, hidden, Epilogue::none}, {"o", hidden, q * 128, Epilogue::residual},
                              {"gate_up", 2 * mlp, hidden, Epilogue::silu_mul}, {"down", hidden, mlp, Epilogue::residual}};
  const std::vector<int> tokens = {1, 8, 16, 32, 64, 128, 256, 1024, 4096};
  std::vector<double> fixed(tokens.size()), best(tokens.size());
  for (const Product& product : products) {
    Matrices matrices = make_matrices(WeightKind::awq, product.n, product.k, product.epilogue == Epilogue::silu_mul);
    const DeviceArray<char> x(static_cast<size_t>(tokens.back()) * product.k * 2), y(static_cast<size_t>(tokens.back()) * product.n * 2);
    fill_random(x.get(), x.size(), false);
    fill_random(y.get(), y.size(), false);
    const int chosen = matrices.copies[0].segments;
    for (size_t j = 0; j < tokens.size(); ++j) {
      const int m = tokens[j];
      std::map<int, double> us;  // by segments
      for (int round = 0; round < 2; ++round) {
        for (const int segments : {1, 2, 4, 8}) {
          for (PackedMatrix& copy : matrices.copies) copy.segments = segments;
          const int launches = m >= 4096 ? 3 : static_cast<int>(std::max<size_t>(matrices.copies.size(), 12));
          try {
            const double now = time_us(launches, [&](int i) {
              const GemmArgs args = gemm_args(matrices.copies[static_cast<size_t>(i) % matrices.copies.size()], x.get(), m, y.get(), product.epilogue, false, scratch);
              select_gemm(args, context).run(args, context);
            });
            us[segments] = us.contains(segments) ? std::min(us[segments], now) : now;
          } catch (const Error&) {  // no kernel for so many
            cudaGraph_t graph = nullptr;
            (void)cudaStreamEndCapture(stream(), &graph);
            if (graph != nullptr) (void)cudaGraphDestroy(graph);
          }
        }
      }
      double least = us[chosen];
      for (const auto& [segments, time] : us) {
        report.add("segments", format("%s %s M=%d, %d segments%s", label, product.name, m, segments, segments == chosen ? ", the library's" : ""), time, matrices.bytes, 2.0 * m * product.n * product.k);
        least = std::min(least, time);
      }
      fixed[j] += us[chosen];
      best[j] += least;
    }
  }
  for (size_t j = 0; j < tokens.size(); ++j) {
    report.add("layer", format("%s M=%d, the library's segments", label, tokens[j]), fixed[j], 0, 0);
    report.add("layer", format("%s M=%d, the fastest (%.1f %% less)", label, tokens[j], 100 * (1 - best[j] / fixed[j])), best[j], 0, 0);
  }
}

// A paged cache and the step arrays of `batch` sequences of `length` keys each.
struct Paged {
  int heads, kv_heads, dim, batch, length, queries, bits;
  std::vector<std::unique_ptr<DeviceArray<char>>> caches;  // one layer each, rotated through
  std::unique_ptr<DeviceArray<uint16_t>> qkv, y;
  std::unique_ptr<DeviceArray<int32_t>> positions, slots, start, len, split, stride, table;
  std::unique_ptr<DeviceArray<int2>> items, tiles;
  std::unique_ptr<DeviceArray<float>> freq;
  std::unique_ptr<DeviceArray<uint32_t>> records;
  StepArrays step;
  int num_items = 0, num_tiles = 0;
  size_t cache_bytes = 0;  // of a layer

  Paged(int q, int kv, int d, int sequences, int keys, int rows, size_t copies_bytes, int kv_bits = 16)
      : heads(q), kv_heads(kv), dim(d), batch(sequences), length(keys), queries(rows), bits(kv_bits) {
    const int blocks = ceil_div(keys, kBlockTokens);
    cache_bytes = static_cast<size_t>(sequences) * blocks * kv * 2 * kv_tile_bytes(d, kv_bits);
    const size_t copies = std::clamp<size_t>(copies_bytes / cache_bytes + 1, 1, 64);
    for (size_t i = 0; i < copies; ++i) {
      caches.push_back(std::make_unique<DeviceArray<char>>(cache_bytes));
      fill_random(caches.back()->get(), cache_bytes, false);
    }
    std::vector<int32_t> h_positions, h_slots, h_start{0}, h_len, h_split, h_table;
    std::vector<int2> h_items, h_tiles;
    for (int s = 0; s < sequences; ++s) {
      for (int t = keys - rows; t < keys; ++t) {
        h_positions.push_back(t);
        h_slots.push_back((s + (t / kBlockTokens) * sequences) * kBlockTokens + t % kBlockTokens);
      }
      h_start.push_back(static_cast<int32_t>(h_positions.size()));
      h_len.push_back(keys);
      h_split.push_back(static_cast<int32_t>(h_items.size()));
      for (int b = 0; b < blocks; ++b) h_table.push_back(s + b * sequences);
      for (int i = 0; rows <= kMaxDecodeRows && i < ceil_div(keys, kSplitTokens); ++i) h_items.push_back({s, i});
      for (int i = 0; rows > kMaxDecodeRows && i < rows; i += kQueryTile) h_tiles.push_back({s, i});
    }
    num_items = static_cast<int>(h_items.size());
    num_tiles = static_cast<int>(h_tiles.size());
    h_items.push_back({-1, 0});
    h_tiles.push_back({-1, 0});
    positions = std::make_unique<DeviceArray<int32_t>>(h_positions);
    slots = std::make_unique<DeviceArray<int32_t>>(h_slots);
    start = std::make_unique<DeviceArray<int32_t>>(h_start);
    len = std::make_unique<DeviceArray<int32_t>>(h_len);
    split = std::make_unique<DeviceArray<int32_t>>(h_split);
    stride = std::make_unique<DeviceArray<int32_t>>(std::vector<int32_t>{blocks, num_items});
    table = std::make_unique<DeviceArray<int32_t>>(h_table);
    items = std::make_unique<DeviceArray<int2>>(h_items);
    tiles = std::make_unique<DeviceArray<int2>>(h_tiles);
    freq = std::make_unique<DeviceArray<float>>(std::vector<float>(static_cast<size_t>(d) / 2, 0.01F));
    records = std::make_unique<DeviceArray<uint32_t>>(h_items.size() * static_cast<size_t>(std::min(rows, kMaxDecodeRows)) *
                                                      decode_record_bytes(q, d) / sizeof(uint32_t));
    qkv = std::make_unique<DeviceArray<uint16_t>>(static_cast<size_t>(sequences) * rows * (q + 2 * kv) * d);
    fill_random(qkv->get(), qkv->size() * 2, false);
    y = std::make_unique<DeviceArray<uint16_t>>(static_cast<size_t>(sequences) * rows * q * d);
    step = {.positions = positions->get(), .slots = slots->get(), .query_start = start->get(), .kv_len = len->get(),
            .split_start = split->get(), .decode_items = items->get(), .query_tiles = tiles->get(),
            .block_stride = stride->get(), .block_table = table->get()};
  }
  void rope(const LaunchContext& context, int i, void* x) const {
    rope_kv(context, DType::bf16, {.qkv = x, .cache = caches[static_cast<size_t>(i) % caches.size()]->get(), .kv_bits = bits,
                                   .rope = {.inv_freq = freq->get()}, .positions = positions->get(), .slots = slots->get(),
                                   .tokens = batch * queries, .num_heads = heads, .num_kv_heads = kv_heads, .head_dim = dim});
  }
  // fused: with what `rope` does.
  void attend(const LaunchContext& context, int i, const void* x, void* out, bool portable = false, bool fused = false) const {
    const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
    char* cache = caches[static_cast<size_t>(i) % caches.size()]->get();
    if (queries <= kMaxDecodeRows) {
      decode_attention(context, DType::bf16, {.qkv = x, .y = out, .cache = cache, .kv_bits = bits, .rope = {.inv_freq = fused ? freq->get() : nullptr}, .step = step, .num_items = num_items,
                                              .max_rows = queries, .records = records->get(), .num_heads = heads, .num_kv_heads = kv_heads,
                                              .head_dim = dim, .softmax_scale = scale});
    } else {
      prefill_attention(context, DType::bf16, {.qkv = x, .y = out, .cache = cache, .kv_bits = bits, .step = step, .tokens = batch * queries, .num_tiles = num_tiles,
                                               .num_heads = heads, .num_kv_heads = kv_heads, .head_dim = dim, .softmax_scale = scale, .portable = portable});
    }
  }
};

// part: "decode", "drafts", "prefill" or "vision" alone; else all.
void bench_attention(Report& report, const LaunchContext& context, const std::string& part) {
  const auto wanted = [&](const char* name) { return part == name || !kAttentionParts.contains(part); };
  const auto decode = [&](int q, int kv, int batch, int length, int rows, int bits) {
    // More caches than L2 keeps anything of, whatever it evicts first.
    const Paged paged(q, kv, 128, batch, length, rows, size_t{3} << 30, bits);
    const double us = time_us(24, [&](int i) { paged.attend(context, i, paged.qkv->get(), paged.y->get(), false, true); });
    report.add("decode_attention", format("%d/%d x 128, %d rows of %d, %d keys, %d bits", q, kv, rows, batch, length, bits), us,
               static_cast<double>(paged.cache_bytes), 4.0 * batch * rows * q * 128.0 * length);
  };
  for (const int bits : {16, 8, 4}) {
    if (!wanted("decode")) break;
    for (const auto& [q, kv, batch, length] : {std::tuple{40, 8, 1, 1024}, {40, 8, 1, 8192}, {40, 8, 16, 8192}, {40, 8, 64, 1024},
                                               {16, 2, 1, 8192}, {16, 2, 16, 8192}, {16, 2, 64, 1024}}) {
      decode(q, kv, batch, length, 1, bits);
    }
  }
  if (wanted("drafts")) {
    decode(40, 8, 1, 8192, 5, 16);
    decode(40, 8, 16, 8192, 5, 16);
    decode(16, 2, 1, 8192, 5, 16);
  }
  const auto prefill = [&](int q, int kv, int length, int bits, bool portable = false) {
    const Paged paged(q, kv, 128, 1, length, length, 0, bits);
    const double us = time_us(4, [&](int i) { paged.attend(context, i, paged.qkv->get(), paged.y->get(), portable); });
    report.add(portable ? "prefill_attention_mma_sync" : "prefill_attention", format("%d/%d x 128, causal %d, %d bits", q, kv, length, bits), us,
               static_cast<double>(paged.cache_bytes), 2.0 * q * 128.0 * length * length);
  };
  if (wanted("prefill")) {
    for (const auto& [q, kv, length] : {std::tuple{40, 8, 1024}, {40, 8, 4096}, {40, 8, 16384}, {16, 2, 4096}}) prefill(q, kv, length, 16);
    prefill(40, 8, 4096, 16, true);
    prefill(40, 8, 4096, 8);
    prefill(40, 8, 4096, 4);
  }
  if (!wanted("vision")) return;
  const DeviceArray<uint16_t> qkv(size_t{13} * 1025 * 3072);
  fill_random(qkv.get(), qkv.size() * 2, false);
  const DeviceArray<uint16_t> y(size_t{13} * 1025 * 1024);
  for (const bool portable : {false, true}) {
    const double us = time_us(6, [&](int) {
      tile_attention(context, DType::bf16, {.qkv = qkv.get(), .y = y.get(), .num_tiles = 13, .tokens = 1025, .num_heads = 16,
                                            .head_dim = 64, .softmax_scale = 0.125F, .portable = portable});
    });
    report.add(portable ? "tile_attention_mma_sync" : "tile_attention", "13 tiles x 1025, 16 x 64", us, 8.0 * 13 * 1025 * 1024, 4.0 * 13 * 16 * 64.0 * 1025 * 1025);
  }
}

void bench_small(Report& report, const LaunchContext& context) {
  const DeviceArray<uint16_t> x(size_t{4096} * 5120), y(size_t{4096} * 5120);
  fill_random(x.get(), x.size() * 2, false);
  const DeviceArray<float> weight(std::vector<float>(5120, 1.0F));
  for (int rows : {1, 64, 4096}) {
    const double us = time_us(30, [&](int) {
      norm(context, DType::bf16, {.weight = weight.get(), .x = x.get(), .y = y.get(), .ldx = 5120, .ldy = 5120, .rows = rows, .columns = 5120});
    });
    report.add("norm", format("%d x 5120", rows), us, 4.0 * rows * 5120, 0);
  }
  const DeviceArray<float> logits(Random(1).floats(size_t{16} * 152064));
  DevicePool pool;
  const SamplerSizes sizes = sampler_sizes({.max_rows = 64, .vocab_size = 152064, .max_kv_len = 1024}, 64);
  CudaSampler sampler(sizes, context, pool);
  cuda_check(cudaMemcpy(sampler.logits(), logits.get(), logits.size() * sizeof(float), cudaMemcpyDeviceToDevice));
  for (int rows : {1, 16}) {
    const double us = time_us(30, [&](int) { sampler.scan(context, rows, 152064); });
    report.add("scan_logits", format("%d x 152064", rows), us, 4.0 * rows * 152064, 0);
  }
  // Upload, kernel and download of a step's sampling, host clock included: what a step waits for.
  SamplingParams top_k, top_p, plain;
  top_k.do_sample = top_p.do_sample = plain.do_sample = true;
  top_k.top_k = 50;
  top_p.top_p = 0.9F;
  for (const auto& [name, params] : {std::pair{"top-k 50", &top_k}, {"top-p 0.9", &top_p}, {"temperature", &plain}}) {
    for (size_t rows : {size_t{1}, size_t{16}}) {
      const std::vector<SampleRow> wanted(rows, SampleRow{.params = params});
      std::vector<SampleResult> results(rows);
      std::vector<double> times;
      for (int i = 0; i < 30; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        sampler.sample(context, 152064, wanted, results);
        times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
      }
      std::sort(times.begin(), times.end());
      report.add("sample", format("%zu rows, %s", rows, name), times[times.size() / 2], 4.0 * static_cast<double>(rows) * 152064, 0);
    }
  }
}

// The kernels of a decode step's layers, each of eight layers with weights and cache of its own: all, the
// matrix products alone, the others alone, and all with rope_kv or the norms as kernels of their own.
void bench_layers(Report& report, const LaunchContext& context, Scratch& scratch, const char* label, int hidden, int q, int kv,
                  int mlp, int batch, int length, int bits = 16) {
  constexpr int kLayers = 8;
  constexpr int kLaunches = 32;  // as in a whole step, where a graph's own start weighs little
  const int qkv_n = (q + 2 * kv) * 128;
  const Matrices qkv = make_matrices(WeightKind::awq, qkv_n, hidden, false, SIZE_MAX / 4, kLayers);
  const Matrices o = make_matrices(WeightKind::awq, hidden, q * 128, false, SIZE_MAX / 4, kLayers);
  const Matrices gate_up = make_matrices(WeightKind::awq, 2 * mlp, hidden, true, SIZE_MAX / 4, kLayers);
  const Matrices down = make_matrices(WeightKind::awq, hidden, mlp, false, SIZE_MAX / 4, kLayers);
  const Paged paged(q, kv, 128, batch, length, 1, size_t{300} << 20, bits);
  const auto rows = static_cast<size_t>(batch);
  const DeviceArray<uint16_t> x(rows * hidden), normed(rows * hidden), qkv_out(rows * qkv_n), attended(rows * q * 128), middle(rows * mlp);
  const DeviceArray<float> weight(std::vector<float>(static_cast<size_t>(hidden), 1.0F));
  fill_random(x.get(), x.size() * 2, false);
  fill_random(qkv_out.get(), qkv_out.size() * 2, false);
  const NormArgs norm_args{.weight = weight.get(), .x = x.get(), .y = normed.get(), .ldx = hidden, .ldy = hidden, .rows = batch, .columns = hidden};
  const DeviceArray<float> strips(std::vector<float>(rows * hidden / kNarrowStrip, 16.0F)), scales(rows);
  const NextNorm next{.weight = weight.get(), .z = normed.get(), .strips = strips.get(), .strip_columns = strip_columns(WeightKind::awq, batch)};
  const InputNorm input{.strips = strips.get(), .strip_columns = strip_columns(WeightKind::awq, batch), .columns = hidden, .inverse_columns = 1.0F / static_cast<float>(hidden), .eps = 1e-6F};
  // The halves of the norms that products have; `apart`: both, and the strips folded by a kernel.
  enum class Split { none, written, read, both, apart };
  const auto gemm = [&](const Matrices& w, int i, const void* in, void* out, Epilogue epilogue, Split split) {
    GemmArgs args = gemm_args(w.copies[static_cast<size_t>(i) % kLayers], in, batch, out, epilogue, false, scratch);
    if (epilogue == Epilogue::residual) {
      if (split != Split::none && split != Split::read) args.next_norm = next;
    } else if (split != Split::none && split != Split::written) {
      args.input_norm = input;
      if (split == Split::apart || !folds_in_ctas(context.sm, hidden, batch)) {
        fold_strips(context, input, scales.get(), batch);
        args.input_norm.scales = scales.get();
      }
    }
    select_gemm(args, context).run(args, context);
  };
  const auto layer = [&](bool gemms, bool others, bool fused, Split split = Split::none) {
    const bool norms = others && split == Split::none;
    return time_us(kLaunches, [&](int i) {
      if (norms) norm(context, DType::bf16, norm_args);
      if (gemms) gemm(qkv, i, normed.get(), qkv_out.get(), Epilogue::none, split);
      if (others && !fused) paged.rope(context, i, qkv_out.get());
      if (others) paged.attend(context, i, qkv_out.get(), attended.get(), false, fused);
      if (gemms) gemm(o, i, attended.get(), x.get(), Epilogue::residual, split);
      if (norms) norm(context, DType::bf16, norm_args);
      if (gemms) gemm(gate_up, i, normed.get(), middle.get(), Epilogue::silu_mul, split);
      if (gemms) gemm(down, i, middle.get(), x.get(), Epilogue::residual, split);
    });
  };
  const double weights = qkv.bytes + o.bytes + gate_up.bytes + down.bytes;
  const auto keys = static_cast<double>(paged.cache_bytes);
  const double flops = 2.0 * batch * (static_cast<double>(qkv_n) * hidden + static_cast<double>(hidden) * q * 128 + 3.0 * hidden * mlp);
  const std::string shape = format("%s, batch %d, %d keys, %d bits", label, batch, length, bits);
  report.add("decode_layer", shape, layer(true, true, true, Split::both), weights + keys, flops);
  report.add("  factors apart", shape, layer(true, true, true, Split::apart), weights + keys, flops);
  report.add("  norms apart", shape, layer(true, true, true), weights + keys, flops);
  report.add("  rope_kv apart", shape, layer(true, true, false), weights + keys, flops);
  report.add("  GEMMs alone", shape, layer(true, false, true), weights, flops);
  report.add("  .. with z and sums", shape, layer(true, false, true, Split::written), weights, flops);
  report.add("  .. scaled by token", shape, layer(true, false, true, Split::read), weights, flops);
  report.add("  without GEMMs", shape, layer(false, true, true), keys, 0);
  report.add("  .. rope_kv apart", shape, layer(false, true, false), keys, 0);
  report.add("  two norms", shape, time_us(kLaunches, [&](int) {
               norm(context, DType::bf16, norm_args);
               norm(context, DType::bf16, norm_args);
             }), 0, 0);
}

}  // namespace

int main(int argc, char** argv) {
  require_device();
  const bool quick = argc > 2;
  Report report;
  LaunchContext context = test_context();
  context.stream = stream();
  Scratch scratch;
  {
    const DeviceArray<char> a(size_t{2} << 30), b(size_t{2} << 30);
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
    cuda_check(cudaEventCreate(&begin));
    cuda_check(cudaEventCreate(&end));
    double us = 1e30;
    for (int i = 0; i < 8; ++i) {
      cuda_check(cudaEventRecord(begin, stream()));
      for (int j = 0; j < 4; ++j) cuda_check(cudaMemcpyAsync(b.get(), a.get(), a.size(), cudaMemcpyDeviceToDevice, stream()));
      cuda_check(cudaEventRecord(end, stream()));
      cuda_check(cudaEventSynchronize(end));
      float ms = 0;
      cuda_check(cudaEventElapsedTime(&ms, begin, end));
      us = std::min(us, ms * 1e3 / 4);
    }
    report.copy_tbs = 2.0 * static_cast<double>(a.size()) / us * 1e-6;
    report.add("copy", "2 GiB", us, 2.0 * static_cast<double>(a.size()), 0);
  }
  const std::string part = quick ? argv[2] : "";
  const auto layers = [&] {
    for (const int batch : {1, 8, 16, 32, 64, 128, 256}) {
      bench_layers(report, context, scratch, "32B", 5120, 40, 8, 27648, batch, 1024);
      bench_layers(report, context, scratch, "4B", 2048, 16, 2, 11008, batch, 1024);
    }
  };
  if (part == "segments") {
    bench_segments(report, context, scratch, "32B", 5120, 40, 8, 27648);
    bench_segments(report, context, scratch, "4B", 2048, 16, 2, 11008);
    report.write(argv[1]);
    return 0;
  }
  if (part == "layers") {
    layers();
    report.write(argv[1]);
    return 0;
  }
  bench_attention(report, context, part);
  if (kAttentionParts.contains(part)) {
    report.write(argv[1]);
    return 0;
  }
  bench_small(report, context);
  const std::vector<int> tokens = quick ? std::vector<int>{1, 16, 64, 256, 1024} : std::vector<int>{1, 8, 16, 32, 64, 128, 256, 1024, 4096};
  const auto u4 = [&](const char* label, int n, int k, Epilogue epilogue) {
    bench_gemm(report, context, scratch, WeightKind::awq, label, n, k, epilogue, tokens);
  };
  u4("32B qkv 5120x7168", 7168, 5120, Epilogue::none);
  u4("32B o 5120x5120", 5120, 5120, Epilogue::residual);
  u4("32B gate_up 5120x55296", 55296, 5120, Epilogue::silu_mul);
  u4("32B down 27648x5120", 5120, 27648, Epilogue::residual);
  u4("4B qkv 2048x2560", 2560, 2048, Epilogue::none);
  u4("4B o 2048x2048", 2048, 2048, Epilogue::residual);
  u4("4B gate_up 2048x22016", 22016, 2048, Epilogue::silu_mul);
  u4("4B down 11008x2048", 2048, 11008, Epilogue::residual);
  const auto dense = [&](const char* label, int n, int k, Epilogue epilogue, const std::vector<int>& m, bool f32 = false) {
    bench_gemm(report, context, scratch, WeightKind::dense, label, n, k, epilogue, m, f32);
  };
  dense("head 2048x151674", 151674, 2048, Epilogue::none, {1, 16, 64, 256}, true);
  dense("head 5120x152064", 152064, 5120, Epilogue::none, {1, 16, 64, 256}, true);
  dense("ViT qkv 1024x3072", 3072, 1024, Epilogue::none, {1025, 13325});
  dense("ViT fc1 1024x4096", 4096, 1024, Epilogue::gelu, {1025, 13325});
  dense("ViT fc2 4096x1024", 1024, 4096, Epilogue::residual, {1025, 13325});
  dense("square 8192", 8192, 8192, Epilogue::none, {8192});
  layers();
  if (argc > 1) report.write(argv[1]);
  return 0;
}
