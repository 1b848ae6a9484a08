// What a checkpoint holds for one matrix, as views of the mapped file. Backends repack from here;
// nothing is converted on the way.
#pragma once

#include <string>
#include <vector>

#include "base/tensor_view.h"

namespace turbomind {

enum class WeightKind : uint8_t {
  dense,  // weight [N, K], f32 | f16 | bf16
  awq  // AutoAWQ "gemm": qweight i32 [K, N/8], qzeros i32 [K/g, N/8], scales f16|bf16|f32 [K/g, N]
};

// Column held by nibble p (bits 4p..4p+3) of an AWQ int32 (AutoAWQ's packing order).
inline constexpr int kAwqColumnOfNibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};

struct LinearPart {
  WeightKind kind = WeightKind::dense;
  int64_t out_features = 0;  // N of this part
  ConstTensorView weight;    // dense
  ConstTensorView qweight;   // awq
  ConstTensorView qzeros;    // awq
  ConstTensorView scales;    // awq
  ConstTensorView bias;      // [N] or empty
};

enum class PartOrder : uint8_t {
  concatenated,  // outputs of part 0, then part 1, …
  gate_up        // two parts of equal N; used with Epilogue::silu_mul, output has N columns
};

// y = x * W^T + bias, W made of `parts` along N. All parts have one kind, K and group size.
struct LinearSource {
  std::string name;  // for messages
  int64_t in_features = 0;
  int group_size = 0;  // awq: 32, 64 or 128; dense: 0
  PartOrder order = PartOrder::concatenated;
  std::vector<LinearPart> parts;

  WeightKind kind() const { return parts.at(0).kind; }
  int64_t out_features() const {
    int64_t n = 0;
    for (const LinearPart& part : parts) n += part.out_features;
    return n;
  }
};

// A table [V, H] as a matrix of V outputs.
inline LinearSource embedding_source(ConstTensorView table) {
  LinearPart part;
  part.out_features = table.dim(0);
  part.weight = table;
  LinearSource source;
  source.name = "the embedding table";
  source.in_features = table.dim(1);
  source.parts = {part};
  return source;
}

}  // namespace turbomind
