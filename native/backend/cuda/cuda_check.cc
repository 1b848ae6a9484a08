#include "backend/cuda/cuda_check.h"

namespace turbomind::cuda {
namespace {

double gib(size_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

}  // namespace

void throw_cuda_error(cudaError_t status, const char* what, std::source_location where) {
  const std::string text = format("%s failed: %s (%s, %s:%u)", what, cudaGetErrorString(status),
                                  cudaGetErrorName(status), where.file_name(), where.line());
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // not sticky
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    throw Error(ErrorCode::out_of_memory, format("%s; %.2f of %.2f GiB of GPU memory are free",
                                                 text.c_str(), gib(free_bytes), gib(total_bytes)));
  }
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice ||
      status == cudaErrorInvalidDevice) {
    throw Error(ErrorCode::unsupported_device, text);
  }
  throw Error(ErrorCode::device_error, text);
}

}  // namespace turbomind::cuda
