// What load_linear and load_head hand out: packed weights, metered. Not changed once loaded.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "backend/backend.h"
#include "backend/cpu/host_memory.h"
#include "backend/cpu/packed_linear.h"

namespace turbomind::cpu {

template <class Packed>
class CpuWeight final : public LinearWeight {
 public:
  CpuWeight(std::unique_ptr<Packed> packed, MemoryMeter meter)
      : packed_(std::move(packed)), metered_(std::move(meter), packed_->bytes()) {}
  int64_t in_features() const override { return packed_->in_features(); }
  int64_t out_features() const override { return packed_->out_features(); }
  size_t bytes() const override { return packed_->bytes(); }
  const Packed* packed() const { return packed_.get(); }

 private:
  std::unique_ptr<const Packed> packed_;
  Metered metered_;
};
using CpuLinear = CpuWeight<PackedLinear>;
using CpuHead = CpuWeight<PackedHead>;

inline constexpr int kLogitRows = 32;  // rows of logits held at once

inline void expect_f32(const char* what, ConstTensorView view) {
  TM_CHECK(view.dtype == DType::f32, "%s is %s; the CPU backend computes in f32", what,
           std::string(to_string(view.dtype)).c_str());
}

}  // namespace turbomind::cpu
