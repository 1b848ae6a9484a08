// Where a checkpoint's tensors lie: the table that lib/checkpoint reads from the safetensors
// headers and hands over. Plain data; io/weights.h maps and checks it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/types.h"

namespace turbomind {

// One tensor of the checkpoint under its canonical name (see models/canonical_names.md).
struct TensorEntry {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  int file_idx = 0;
  uint64_t offset = 0;  // from the start of the file
  uint64_t bytes = 0;
};

struct CheckpointFiles {
  std::vector<std::string> paths;
  std::vector<TensorEntry> tensors;
};

}  // namespace turbomind
