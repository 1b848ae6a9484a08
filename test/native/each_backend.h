// One case, many backends: for_each_backend runs a test on the reference and on every backend of
// this machine, each with the error it is allowed. A backend that is missing is named, never passed.
#pragma once

#include <cstdio>
#include <functional>
#include <memory>
#include <string>

#include "reference_backend.h"

namespace turbomind::test {

// Largest absolute error of logits and embeddings of magnitude 1 to 20 against float64.
struct Tolerance {
  double dense = 0;  // f32, f16 and bf16 weights
  double awq = 0;    // 4-bit weights
};

// Reference: values are kept as f32 between ops, sums are double.
inline constexpr Tolerance kReferenceTolerance{5e-5, 5e-5};

inline void for_each_backend(const std::function<void(Backend&, const Tolerance&)>& body) {
  std::printf("  on reference\n");
  ReferenceBackend reference;
  body(reference, kReferenceTolerance);
}

}  // namespace turbomind::test
