// Device names → backends. The only file that knows which backends exist.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace turbomind {

struct BackendOptions {
  std::string device = "cpu";  // "cpu", "cuda", "cuda:1"; "auto" is resolved in lib/
  int threads = 0;             // CPU threads; 0: as many as the process may use
  std::string cuda_library;    // path of the CUDA backend library; empty: none
  std::string cpu_isa;         // "", "scalar", "avx2", "avx512", "amx": a cap, for tests
};

// Throws Error{unsupported_device} with every reason.
std::unique_ptr<Backend> make_backend(const BackendOptions& options);

}  // namespace turbomind
