// The CUDA backend's entry points. For now it answers which devices there are.
#include <cuda_runtime_api.h>

#include <cstdio>

// Writes a line of text about device `index` into `text`; returns the number of devices, or minus
// the CUDA error when the driver does not answer (then `text` holds its message).
extern "C" __attribute__((visibility("default"))) int turbomind_cuda_query(int index, char* text,
                                                                          size_t text_bytes) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    std::snprintf(text, text_bytes, "%s", cudaGetErrorString(status));
    return -static_cast<int>(status);
  }
  cudaDeviceProp properties{};
  if (index < count && cudaGetDeviceProperties(&properties, index) == cudaSuccess) {
    std::snprintf(text, text_bytes, "%s, sm_%d%d, %.1f GiB", properties.name, properties.major,
                  properties.minor, static_cast<double>(properties.totalGlobalMem) / (1 << 30));
  }
  return count;
}
