// See backends.h.
#include "backend/backends.h"

#include "backend/cpu/cpu_backend.h"

namespace turbomind {
namespace {

bool names_cuda(const std::string& device) {
  return device == "cuda" || device.rfind("cuda:", 0) == 0;
}

}  // namespace

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device == "cpu") {
    return std::make_unique<cpu::CpuBackend>(
        cpu::CpuBackendOptions{.threads = options.threads, .isa = options.cpu_isa});
  }
  if (names_cuda(options.device)) {
    throw Error(ErrorCode::unsupported_device,
                format("device '%s': the CUDA backend of this build answers device queries only "
                       "and runs no model yet; use device 'cpu'",
                       options.device.c_str()));
  }
  throw Error(
      ErrorCode::unsupported_device,
      format("device '%s' is unknown; expected 'cpu', 'cuda' or 'cuda:N'", options.device.c_str()));
}

}  // namespace turbomind
