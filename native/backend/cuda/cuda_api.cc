// The CUDA library's exported functions. Any thread.
#include "backend/cuda_api.h"

#include <cstdio>
#include <exception>

#include "backend/cuda/cuda_backend.h"

namespace {

using turbomind::cuda::CallStatus;

void fill(CallStatus* status, int code, const char* message) {
  status->code = code;
  std::snprintf(status->message, sizeof status->message, "%s", message);
}

template <class Body>
void guarded(CallStatus* status, Body&& body) {
  status->code = -1;
  try {
    body();
  } catch (const turbomind::Error& error) {
    fill(status, static_cast<int>(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    fill(status, static_cast<int>(turbomind::ErrorCode::out_of_memory), "host memory is used up");
  } catch (const std::exception& error) {
    fill(status, static_cast<int>(turbomind::ErrorCode::internal), error.what());
  }
}

}  // namespace

#define TURBOMIND_EXPORT extern "C" __attribute__((visibility("default")))

TURBOMIND_EXPORT int turbomind_cuda_abi_version() { return turbomind::cuda::kAbiVersion; }

TURBOMIND_EXPORT turbomind::Backend* turbomind_cuda_create(
    const turbomind::cuda::CreateOptions* options, CallStatus* status) {
  turbomind::Backend* backend = nullptr;
  guarded(status, [&] { backend = turbomind::cuda::make_cuda_backend(*options).release(); });
  return backend;
}

TURBOMIND_EXPORT void turbomind_cuda_guard(void (*body)(void*), void* context, CallStatus* status) {
  guarded(status, [&] { body(context); });
}

TURBOMIND_EXPORT void turbomind_cuda_raise() {
  throw turbomind::Error(turbomind::ErrorCode::internal, "the forward failed");
}

// Writes a line of text about device `index` into `text`; returns the number of devices, or minus
// the CUDA error when the driver does not answer (then `text` holds its message).
TURBOMIND_EXPORT int turbomind_cuda_query(int index, char* text, size_t text_bytes) {
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
