// One case, many backends: for_each_backend runs a test on the reference and on the CPU backend at
// each instruction set of this machine, each with the error it is allowed. What this machine lacks
// is said, never counted as passed.
#pragma once

#include <cstdio>
#include <functional>
#include <memory>
#include <string>

#include "backend/backends.h"
#include "backend/cpu/isa.h"
#include "reference_backend.h"

namespace turbomind::test {

// Largest absolute error of logits and embeddings (magnitude 1 to 20) against float64.
struct Tolerance {
  double dense = 0;  // f32, f16 and bf16 weights
  double awq = 0;    // 4-bit weights
};

// Values are kept as f32 between ops, sums are double.
inline constexpr Tolerance kReferenceTolerance{5e-5, 5e-5};
// Dense: sums in f32; AMX takes x as two bf16 terms, 16 bits. AWQ: x is rounded to 16-bit fixed
// point per group, 3e-5 of its largest value, and random layers of gain 1.5 amplify it where
// trained ones do not. Measured over all fixtures: 2.0e-4 and 3.8e-3, at logits of up to 22.
inline constexpr Tolerance kCpuTolerance{5e-4, 5e-3};

inline constexpr int kTestThreads = 2;

inline std::unique_ptr<Backend> make_cpu_backend(const std::string& isa,
                                                 int threads = kTestThreads) {
  return make_backend({.device = "cpu", .threads = threads, .cuda_library = "", .cpu_isa = isa});
}

// Names of the instruction sets that this machine has.
inline std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::amx}) {
    if (isa <= cpu::best_isa()) {
      names.emplace_back(cpu::to_string(isa));
    } else {
      std::printf("  SKIP: this machine has no %s\n", cpu::to_string(isa));
    }
  }
  return names;
}

inline void for_each_backend(const std::function<void(Backend&, const Tolerance&)>& body) {
  std::printf("  on reference\n");
  ReferenceBackend reference;
  body(reference, kReferenceTolerance);
  for (const std::string& isa : cpu_isas()) {
    std::printf("  on cpu, %s\n", isa.c_str());
    const std::unique_ptr<Backend> backend = make_cpu_backend(isa);
    body(*backend, kCpuTolerance);
  }
}

}  // namespace turbomind::test
