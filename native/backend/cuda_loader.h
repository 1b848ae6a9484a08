// Loads the CUDA backend's shared library. The only place outside backend/cuda that knows it exists;
// no CUDA type appears. Any thread; the library stays loaded for the life of the process.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"

namespace turbomind {

struct CudaLoadOptions {
  std::string library;  // path of libturbomind_cuda.so
  int device = 0;
  DType activations = DType::bf16;  // bf16, or f16 for checkpoints stored as f16
  bool use_graphs = true;
};

// Throws Error{unsupported_device} with the reason: no such file, another ABI version, no driver, no
// such device, a device too old; or Error{out_of_memory}.
std::unique_ptr<Backend> load_cuda_backend(const CudaLoadOptions& options);

// The N of "cuda:N", 0 for "cuda". Throws Error{unsupported_device} for anything else.
int parse_cuda_device(const std::string& device);

// One line about device `index`, or the reason why there is none.
struct CudaQuery {
  int num_devices = 0;  // 0 when the library or the driver does not answer
  std::string text;
};
CudaQuery query_cuda(const std::string& library, int index);

}  // namespace turbomind
