// Source to packed form: checks what all kinds share, then picks the class. Runs at load.
#include "backend/cpu/packed_linear.h"

#include <algorithm>

#include "backend/cpu/head.h"
#include "backend/cpu/linear_dense.h"
#include "backend/cpu/linear_u4.h"
#include "base/error.h"

namespace turbomind::cpu {
namespace {

void check_parts(const LinearSource& source) {
  if (source.parts.empty() || source.in_features <= 0) {
    throw Error(ErrorCode::tensor_mismatch,
                format("%s: a linear layer needs parts and K > 0, got %zu parts, K = %lld",
                       source.name.c_str(), source.parts.size(),
                       static_cast<long long>(source.in_features)));
  }
  for (const LinearPart& part : source.parts) {
    if (part.kind == source.kind()) continue;
    throw Error(
        ErrorCode::unsupported_quantization,
        format("%s: dense and awq parts in one layer; load them apart", source.name.c_str()));
  }
  if (source.order != PartOrder::gate_up) return;
  if (source.parts.size() != 2 || source.parts[0].out_features != source.parts[1].out_features) {
    throw Error(ErrorCode::tensor_mismatch,
                format("%s: gate_up needs two parts of equal N", source.name.c_str()));
  }
}

}  // namespace

size_t packed_linear_bytes(const LinearSource& source, Isa isa) {
  check_parts(source);
  return source.kind() == WeightKind::awq ? LinearU4::packed_bytes(source)
                                          : LinearDense::packed_bytes(source, isa);
}

size_t packed_head_bytes(const LinearSource& source) { return Head::packed_bytes(source); }

size_t linear_scratch_bound(int64_t rows, int64_t k) {
  return std::max(LinearU4::scratch_bound(rows, k), LinearDense::scratch_bound(rows, k));
}

size_t head_scratch_bound(int64_t rows, int64_t vocab, int64_t hidden) {
  return Head::scratch_bound(rows, vocab, hidden);
}

std::unique_ptr<PackedLinear> pack_linear(const LinearSource& source, Isa isa, ThreadPool& pool) {
  check_parts(source);
  if (source.kind() == WeightKind::awq) return std::make_unique<LinearU4>(source, isa, pool);
  return std::make_unique<LinearDense>(source, isa, pool);
}

}  // namespace turbomind::cpu
