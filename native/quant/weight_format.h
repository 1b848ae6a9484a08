// How a checkpoint stores a matrix: one row per format. A row knows which tensors a linear layer
// has in its format, checks them against the shape the model needs, and can write the matrix out as
// plain floats (the slow, obvious reference that tests judge kernels by).
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "backend/weights.h"
#include "io/weights.h"

namespace turbomind {

// What the model needs of one linear layer.
struct LinearShape {
  int64_t in_features = 0;   // K
  int64_t out_features = 0;  // N
};

struct WeightFormat {
  std::string_view name;
  WeightKind kind = WeightKind::dense;
  // Whether the store holds `prefix` in this format.
  bool (*accepts)(const WeightStore& store, std::string_view prefix);
  // Views of its tensors, bias left empty. group_size: of the model's quantisation config.
  LinearPart (*load)(const WeightStore& store, std::string_view prefix, LinearShape shape,
                     int group_size);
  // out: [N, K] row-major.
  void (*dequantize)(const LinearPart& part, LinearShape shape, int group_size,
                     std::span<float> out);
};

extern const WeightFormat kDenseFormat;  // quant/dense.cc
extern const WeightFormat kAwqFormat;    // quant/awq.cc

// Every format, quantised ones first.
std::span<const WeightFormat* const> weight_formats();

// The row that accepts `prefix`. Throws Error{missing_tensor} if none does.
const WeightFormat& weight_format_of(const WeightStore& store, std::string_view prefix);
const WeightFormat& weight_format_of(WeightKind kind);

// All of `source` as floats, parts one under another: out is [N, K].
void dequantize(const LinearSource& source, std::span<float> out);

// Throws Error{tensor_mismatch} unless `view`, which is tensor `name`, is f32, f16 or bf16.
void check_float_dtype(const WeightStore& store, std::string_view name, ConstTensorView view);

// One element as float; for references and small vectors.
float load_float(const void* data, DType dtype, int64_t index);

}  // namespace turbomind
