// The backends that a whole-stack test runs on.
#pragma once

#include <memory>

#include "backend/backends.h"

namespace turbomind::test {

inline std::unique_ptr<Backend> make_test_backend(int threads, const char* isa = "") {
  return make_backend({.device = "cpu", .threads = threads, .cuda_library = {}, .cpu_isa = isa});
}

}  // namespace turbomind::test
