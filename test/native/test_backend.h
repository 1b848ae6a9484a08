// The backends that a whole-stack test runs on.
#pragma once

#include <memory>

#include "reference_backend.h"

namespace turbomind::test {

// The plain loops, with memory to plan with.
class SizedReference final : public ReferenceBackend {
 public:
  DeviceInfo info() const override { return {"reference", "plain loops", size_t{1} << 30, size_t{1} << 28}; }
};

inline std::unique_ptr<Backend> make_test_backend(int /*threads*/) { return std::make_unique<SizedReference>(); }

}  // namespace turbomind::test
