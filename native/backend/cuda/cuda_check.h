// Every CUDA call passes through cuda_check; every launch through `launch`. Turns CUDA's errors into
// turbomind::Error: out_of_memory and unsupported_device keep their code, the rest is device_error.
#pragma once

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <source_location>
#include <utility>

#include "base/error.h"
#include "base/types.h"

namespace turbomind::cuda {

using CudaStream = cudaStream_t;

[[noreturn]] void throw_cuda_error(cudaError_t status, const char* what,
                                   std::source_location where);

inline void cuda_check(cudaError_t status, const char* what = "a CUDA call",
                       std::source_location where = std::source_location::current()) {
  if (status != cudaSuccess) throw_cuda_error(status, what, where);
}

// Calls f.template operator()<T>() with the activation type that `dtype` names.
template <class F>
decltype(auto) visit_dtype(DType dtype, F&& f) {
  if (dtype == DType::f16) return f.template operator()<__half>();
  TM_CHECK(dtype == DType::bf16, "activations of %s on the GPU; expected bf16 or f16",
           to_string(dtype).data());
  return f.template operator()<__nv_bfloat16>();
}

struct LaunchShape {
  dim3 grid;
  int threads = 128;
  int shared_bytes = 0;
};

// Launches with the programmatic edge on Hopper and later (the kernel then begins with
// grid_dependency_wait), and checks for a launch error.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, CudaStream stream,
            bool programmatic, Arguments&&... arguments) {
  // 48 KB are free to use, less what the kernel declares statically.
  if (shape.shared_bytes > 40 * 1024) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shape.shared_bytes),
               "raising a kernel's shared memory");
  }
  if (shape.shared_bytes > 16 * 1024) {
    // All of the SM's memory as shared memory: the driver's own choice may hold fewer CTAs.
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "choosing a kernel's shared memory carveout");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = programmatic ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
             "launching a kernel");
}

// What a launcher needs to know of the device.
struct LaunchContext {
  CudaStream stream = nullptr;
  int sm = 0;  // 80, 86, 89, 90, 100, 120
  int num_sms = 0;
  int max_shared_bytes = 0;   // one CTA, opted in
  bool programmatic = false;  // programmatic dependent launch
};

}  // namespace turbomind::cuda
