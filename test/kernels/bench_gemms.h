// kernel_bench: matrix products alone, and what segments of K fixed for each shape cost.
#pragma once

#include <map>
#include <memory>

#include "backend/cuda/gemm/gemm_table.h"
#include "bench_report.h"

namespace turbomind::cuda::testing {

struct Matrices {
  std::vector<PackedMatrix> copies;
  std::vector<std::unique_ptr<DeviceArray<char>>> storage;
  double bytes = 0;
};

inline Matrices make_matrices(WeightKind kind, int n, int k, bool gate_up, size_t total_bytes = size_t{300} << 20, size_t most = 64) {
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

inline GemmArgs gemm_args(const PackedMatrix& w, const void* x, int m, void* y, Epilogue epilogue, bool f32, Scratch& scratch) {
  return {.w = &w, .x = x, .ldx = w.k, .m = m, .y = y, .ldy = epilogue == Epilogue::silu_mul ? w.n / 2 : w.n,
          .y_is_f32 = f32, .epilogue = epilogue, .partials = scratch.partials.get(),
          .partial_floats = scratch.partials.size(), .tickets = scratch.tickets.get(), .num_tickets = scratch.tickets.size()};
}

inline void bench_gemm(Report& report, const LaunchContext& context, Scratch& scratch, WeightKind kind, const char* label, int n,
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
inline void bench_segments(Report& report, const LaunchContext& context, Scratch& scratch, const char* label, int hidden, int q, int kv, int mlp) {
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

}  // namespace turbomind::cuda::testing
