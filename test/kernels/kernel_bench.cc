// Times each kernel at the shapes of Qwen2.5-32B and InternVL2.5-4B and writes one JSON document.
// Every launch uses the next of several copies of its weights (more than twice the L2 in all); the
// launches are captured in one graph; figures are medians of nine replays. Ceilings are measured in
// the same run. Usage: kernel_bench OUT.json [quick | decode | drafts | prefill | vision | layers | segments]
#include <chrono>

#include "backend/cuda/cuda_sampler.h"
#include "backend/cuda/split_norms.h"
#include "bench_attention.h"
#include "bench_gemms.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda;
using namespace turbomind::cuda::testing;

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
