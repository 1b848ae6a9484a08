// What the parts of kernel_bench share: the report, the timing of a graph of launches, random contents.
#pragma once

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "gpu_test.h"

namespace turbomind::cuda::testing {

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

inline CudaStream stream() {
  static CudaStream s = [] {
    CudaStream created = nullptr;
    cuda_check(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking));
    return created;
  }();
  return s;
}

// Microseconds of one of `launches` launches in a graph.
inline double time_us(int launches, const std::function<void(int)>& body) {
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
inline void fill_random(void* device, size_t bytes, bool any_bits) {
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

}  // namespace turbomind::cuda::testing
