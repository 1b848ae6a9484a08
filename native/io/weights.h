// The checkpoint's files, mapped read-only, and its tensors by canonical name. Every bound is
// checked against the file's real size before a byte is read, so a truncated or lying checkpoint is
// a typed error and never a fault. Parses nothing: the tensor table comes from lib/checkpoint.
// Built and used on the engine's loading thread; the views stay valid for the store's life.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor_view.h"
#include "io/checkpoint_files.h"

namespace turbomind {

class MappedFile;
class SharedPages;

class WeightStore {
 public:
  // Opens and maps every file that a tensor lies in. Throws Error{invalid_checkpoint} for a file
  // that is missing, not regular or too short for its tensors, for sizes that contradict shapes,
  // and for a name given twice.
  explicit WeightStore(const CheckpointFiles& files);
  ~WeightStore();
  WeightStore(const WeightStore&) = delete;
  WeightStore& operator=(const WeightStore&) = delete;

  bool has(std::string_view name) const;
  // The tensor as stored. Its data is aligned to its dtype: a tensor at an odd file offset is
  // copied once to memory of the store's own. Throws Error{missing_tensor}, and
  // Error{invalid_checkpoint} if the file has shrunk since it was opened.
  ConstTensorView view(std::string_view name) const;
  // The tensor, which must have exactly this shape, else Error{tensor_mismatch} with both shapes.
  ConstTensorView view(std::string_view name, std::span<const int64_t> shape) const;
  ConstTensorView view(std::string_view name, std::initializer_list<int64_t> shape) const {
    return view(name, std::span<const int64_t>(shape.begin(), shape.size()));
  }

  size_t total_bytes() const { return total_bytes_; }  // of all tensors in the table
  // "tensor 'layers.0.mlp.up.weight' in model-00001-of-00002.safetensors", for messages.
  std::string describe(std::string_view name) const;

  // Hints to the kernel about a view of this store: read ahead, or forget the whole pages inside it
  // (they are read from the file again if touched). Both are harmless on any view of the store.
  static void prefetch(ConstTensorView view);
  static void drop_pages(ConstTensorView view);

 private:
  struct Tensor {
    DType dtype = DType::f32;
    std::vector<int64_t> shape;
    int file_idx = 0;
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };

  void add(const TensorEntry& entry);
  const Tensor& tensor(std::string_view name) const;

  std::vector<std::unique_ptr<MappedFile>> files_;  // index: file_idx
  std::map<std::string, Tensor, std::less<>> tensors_;
  // Copies of unaligned tensors, made when first asked for.
  mutable std::map<std::string, std::unique_ptr<SharedPages>, std::less<>> copies_;
  size_t total_bytes_ = 0;
};

// "[896, 4864]"
std::string shape_text(std::span<const int64_t> shape);

}  // namespace turbomind
