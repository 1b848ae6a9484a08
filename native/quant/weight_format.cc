// The table of formats. A new one is one file beside awq.cc and one row here, above dense: a layer
// that holds packed tensors is never plain.
#include "quant/weight_format.h"

#include <bit>
#include <cstring>
#include <string>

namespace turbomind {
namespace {

constexpr const WeightFormat* kFormats[] = {&kAwqFormat, &kDenseFormat};

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t exponent = (half >> 10) & 0x1FU;
  const uint32_t mantissa = half & 0x3FFU;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000U | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <class T>
T load_at(const void* data, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

}  // namespace

std::span<const WeightFormat* const> weight_formats() { return kFormats; }

const WeightFormat& weight_format_of(const WeightStore& store, std::string_view prefix) {
  for (const WeightFormat* row : kFormats) {
    if (row->accepts(store, prefix)) return *row;
  }
  // Nothing is there in any format: report the name the plain format would have.
  store.view(std::string(prefix) + ".weight");
  throw Error(ErrorCode::internal, format("no weight format accepts '%.*s'",
                                          static_cast<int>(prefix.size()), prefix.data()));
}

const WeightFormat& weight_format_of(WeightKind kind) {
  for (const WeightFormat* row : kFormats) {
    if (row->kind == kind) return *row;
  }
  throw Error(ErrorCode::internal, format("no weight format for kind %d", static_cast<int>(kind)));
}

void dequantize(const LinearSource& source, std::span<float> out) {
  TM_CHECK(static_cast<int64_t>(out.size()) == source.out_features() * source.in_features,
           "%s: %zu floats for a matrix of %lld", source.name.c_str(), out.size(),
           static_cast<long long>(source.out_features() * source.in_features));
  size_t begin = 0;
  for (const LinearPart& part : source.parts) {
    const LinearShape shape{source.in_features, part.out_features};
    const size_t count = static_cast<size_t>(shape.in_features * shape.out_features);
    weight_format_of(part.kind).dequantize(part, shape, source.group_size,
                                           out.subspan(begin, count));
    begin += count;
  }
}

float load_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f32:
      return load_at<float>(data, index);
    case DType::f16:
      return half_to_float(load_at<uint16_t>(data, index));
    case DType::bf16:
      return std::bit_cast<float>(static_cast<uint32_t>(load_at<uint16_t>(data, index)) << 16);
    case DType::i32:
      return static_cast<float>(load_at<int32_t>(data, index));
    case DType::i8:
      return static_cast<float>(load_at<int8_t>(data, index));
    case DType::u8:
      return static_cast<float>(load_at<uint8_t>(data, index));
  }
  return 0.0F;
}

void check_float_dtype(const WeightStore& store, std::string_view name, ConstTensorView view) {
  if (view.dtype == DType::f32 || view.dtype == DType::f16 || view.dtype == DType::bf16) return;
  throw Error(ErrorCode::tensor_mismatch,
              format("%s is %s, but the model needs f32, f16 or bf16", store.describe(name).c_str(),
                     std::string(to_string(view.dtype)).c_str()));
}

}  // namespace turbomind
