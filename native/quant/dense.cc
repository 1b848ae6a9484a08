// Plain matrices: `.weight` [N, K] in f32, f16 or bf16. A matrix stored with more dimensions (a
// convolution's [N, 3, p, p]) is read as [N, K] when the first one is N and the rest multiply to K.
#include <string>

#include "quant/weight_format.h"

namespace turbomind {
namespace {

bool accepts(const WeightStore& store, std::string_view prefix) {
  return store.has(std::string(prefix) + ".weight");
}

LinearPart load(const WeightStore& store, std::string_view prefix, LinearShape shape,
                int /*group_size*/) {
  const std::string name = std::string(prefix) + ".weight";
  ConstTensorView weight = store.view(name);
  if (weight.rank < 2 || weight.dim(0) != shape.out_features ||
      weight.row_elements() != shape.in_features) {
    store.view(name, {shape.out_features, shape.in_features});  // throws, with both shapes
  }
  check_float_dtype(store, name, weight);
  LinearPart part;
  part.kind = WeightKind::dense;
  part.out_features = shape.out_features;
  part.weight = ConstTensorView(weight.data, weight.dtype, {shape.out_features, shape.in_features});
  return part;
}

void dequantize_dense(const LinearPart& part, LinearShape shape, int /*group_size*/,
                      std::span<float> out) {
  for (int64_t i = 0; i < shape.out_features * shape.in_features; ++i) {
    out[static_cast<size_t>(i)] = load_float(part.weight.data, part.weight.dtype, i);
  }
}

}  // namespace

const WeightFormat kDenseFormat{"dense", WeightKind::dense, accepts, load, dequantize_dense};

}  // namespace turbomind
