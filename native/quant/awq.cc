// AutoAWQ's "gemm" layout, 4 bit with zero points: `.qweight` i32 [K, N/8], `.qzeros` i32 [K/g,
// N/8] and `.scales` [K/g, N]; w[n, k] = (q - zero) * scale of its group. Eight columns share an
// int32 in the order of kAwqColumnOfNibble.
#include <string>

#include "quant/weight_format.h"

namespace turbomind {
namespace {

bool accepts(const WeightStore& store, std::string_view prefix) {
  return store.has(std::string(prefix) + ".qweight");
}

void check_packable(std::string_view prefix, LinearShape shape, int group_size) {
  const auto refuse = [&](const std::string& why) {
    throw Error(ErrorCode::unsupported_quantization,
                format("awq: layer '%.*s': %s", static_cast<int>(prefix.size()), prefix.data(),
                       why.c_str()));
  };
  if (group_size == 0)
    refuse("the checkpoint holds .qweight, but its config names no quantization");
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    refuse(format("group_size %d; expected 32, 64 or 128", group_size));
  }
  if (shape.in_features % group_size != 0) {
    refuse(format("group_size %d does not divide its %lld input features", group_size,
                  static_cast<long long>(shape.in_features)));
  }
  if (shape.out_features % 8 != 0) {
    refuse(format("%lld output features are not a multiple of 8",
                  static_cast<long long>(shape.out_features)));
  }
}

ConstTensorView load_packed(const WeightStore& store, const std::string& name, int64_t rows,
                            int64_t columns) {
  const ConstTensorView view = store.view(name, {rows, columns});
  if (view.dtype != DType::i32) {
    throw Error(ErrorCode::tensor_mismatch,
                format("%s is %s, but packed 4-bit values are i32", store.describe(name).c_str(),
                       std::string(to_string(view.dtype)).c_str()));
  }
  return view;
}

LinearPart load(const WeightStore& store, std::string_view prefix, LinearShape shape,
                int group_size) {
  check_packable(prefix, shape, group_size);
  const std::string base(prefix);
  const int64_t groups = shape.in_features / group_size;
  LinearPart part;
  part.kind = WeightKind::awq;
  part.out_features = shape.out_features;
  part.qweight = load_packed(store, base + ".qweight", shape.in_features, shape.out_features / 8);
  part.qzeros = load_packed(store, base + ".qzeros", groups, shape.out_features / 8);
  part.scales = store.view(base + ".scales", {groups, shape.out_features});
  check_float_dtype(store, base + ".scales", part.scales);
  return part;
}

// The 4-bit value of column n in a row of packed int32.
int nibble(ConstTensorView packed, int64_t row, int64_t n) {
  const uint32_t word = static_cast<uint32_t>(packed.as<int32_t>()[row * packed.dim(1) + n / 8]);
  for (int p = 0; p < 8; ++p) {
    if (kAwqColumnOfNibble[p] == n % 8) return static_cast<int>((word >> (4 * p)) & 15U);
  }
  return 0;
}

void dequantize_awq(const LinearPart& part, LinearShape shape, int group_size,
                    std::span<float> out) {
  for (int64_t n = 0; n < shape.out_features; ++n) {
    for (int64_t k = 0; k < shape.in_features; ++k) {
      const int64_t group = k / group_size;
      const float scale =
          load_float(part.scales.data, part.scales.dtype, group * shape.out_features + n);
      const int steps = nibble(part.qweight, k, n) - nibble(part.qzeros, group, n);
      out[static_cast<size_t>(n * shape.in_features + k)] = static_cast<float>(steps) * scale;
    }
  }
}

}  // namespace

const WeightFormat kAwqFormat{"awq", WeightKind::awq, accepts, load, dequantize_awq};

}  // namespace turbomind
