// Checks of the tensor table, in the order that keeps each one free of overflow: the entry by
// itself, then against its file, then against the other names.
#include "io/weights.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

#include "io/mapped_file.h"

namespace turbomind {
namespace {

Error invalid(const std::string& message) { return Error(ErrorCode::invalid_checkpoint, message); }

// Product of the shape times the element size, or nothing when it does not fit 64 bits.
std::optional<uint64_t> bytes_of(const std::vector<int64_t>& shape, DType dtype) {
  uint64_t bytes = dtype_bytes(dtype);
  for (int64_t dim : shape) {
    if (dim < 0) return std::nullopt;
    if (dim != 0 && bytes > std::numeric_limits<uint64_t>::max() / static_cast<uint64_t>(dim)) {
      return std::nullopt;
    }
    bytes *= static_cast<uint64_t>(dim);
  }
  return bytes;
}

void check_entry(const TensorEntry& entry, size_t num_files) {
  const char* name = entry.name.c_str();
  if (entry.file_idx < 0 || static_cast<size_t>(entry.file_idx) >= num_files) {
    throw invalid(format("tensor '%s' lies in file %d, but the checkpoint has %zu files", name,
                         entry.file_idx, num_files));
  }
  if (entry.shape.size() > 4) {
    throw invalid(format("tensor '%s' has %zu dimensions; at most 4 are supported", name,
                         entry.shape.size()));
  }
  const std::optional<uint64_t> bytes = bytes_of(entry.shape, entry.dtype);
  if (!bytes || *bytes != entry.bytes) {
    throw invalid(
        format("tensor '%s' of %s %s takes %llu bytes by its shape, but its table entry "
               "says %llu; the checkpoint is damaged",
               name, std::string(to_string(entry.dtype)).c_str(), shape_text(entry.shape).c_str(),
               static_cast<unsigned long long>(bytes.value_or(0)),
               static_cast<unsigned long long>(entry.bytes)));
  }
}

ConstTensorView make_view(const void* data, DType dtype, const std::vector<int64_t>& shape) {
  ConstTensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  return view;
}

}  // namespace

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

WeightStore::WeightStore(const CheckpointFiles& files) {
  files_.resize(files.paths.size());
  for (const TensorEntry& entry : files.tensors) {
    check_entry(entry, files.paths.size());
    std::unique_ptr<MappedFile>& file = files_[static_cast<size_t>(entry.file_idx)];
    if (!file)
      file = std::make_unique<MappedFile>(files.paths[static_cast<size_t>(entry.file_idx)]);
    add(entry);
  }
}

WeightStore::~WeightStore() = default;

void WeightStore::add(const TensorEntry& entry) {
  const MappedFile& file = *files_[static_cast<size_t>(entry.file_idx)];
  // Written so that neither side can overflow.
  if (entry.bytes > file.bytes() || entry.offset > file.bytes() - entry.bytes) {
    throw invalid(format(
        "tensor '%s' needs bytes %llu to %llu + %llu of %s, which has only %llu; "
        "the file is truncated: download it again",
        entry.name.c_str(), static_cast<unsigned long long>(entry.offset),
        static_cast<unsigned long long>(entry.offset), static_cast<unsigned long long>(entry.bytes),
        file.path().c_str(), static_cast<unsigned long long>(file.bytes())));
  }
  Tensor tensor{entry.dtype, entry.shape, entry.file_idx, entry.offset, entry.bytes};
  if (!tensors_.emplace(entry.name, std::move(tensor)).second) {
    throw invalid(format("tensor '%s' appears twice, the second time in %s", entry.name.c_str(),
                         file.path().c_str()));
  }
  total_bytes_ += static_cast<size_t>(entry.bytes);
}

bool WeightStore::has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }

const WeightStore::Tensor& WeightStore::tensor(std::string_view name) const {
  const auto found = tensors_.find(name);
  if (found != tensors_.end()) return found->second;
  std::string files;
  for (const auto& file : files_) {
    if (!file) continue;
    if (!files.empty()) files += ", ";
    files += file->path();
  }
  throw Error(ErrorCode::missing_tensor,
              format("the model needs tensor '%.*s', but the checkpoint (%s) does not hold it",
                     static_cast<int>(name.size()), name.data(),
                     files.empty() ? "no files" : files.c_str()));
}

ConstTensorView WeightStore::view(std::string_view name) const {
  const Tensor& tensor = this->tensor(name);
  const MappedFile& file = *files_[static_cast<size_t>(tensor.file_idx)];
  if (file.current_bytes() < tensor.offset + tensor.bytes) {
    throw invalid(
        format("%s has shrunk to %llu bytes since it was opened; tensor '%.*s' lies past "
               "its end",
               file.path().c_str(), static_cast<unsigned long long>(file.current_bytes()),
               static_cast<int>(name.size()), name.data()));
  }
  // Pages are aligned, so the file offset alone decides the alignment.
  if (tensor.offset % dtype_bytes(tensor.dtype) == 0 || tensor.bytes == 0) {
    return make_view(file.data() + tensor.offset, tensor.dtype, tensor.shape);
  }
  auto copy = copies_.find(name);
  if (copy == copies_.end()) {
    auto pages = std::make_unique<SharedPages>(static_cast<size_t>(tensor.bytes));
    std::memcpy(pages->data(), file.data() + tensor.offset, static_cast<size_t>(tensor.bytes));
    copy = copies_.emplace(name, std::move(pages)).first;
  }
  return make_view(copy->second->data(), tensor.dtype, tensor.shape);
}

ConstTensorView WeightStore::view(std::string_view name, std::span<const int64_t> shape) const {
  const Tensor& tensor = this->tensor(name);
  if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
    throw Error(ErrorCode::tensor_mismatch,
                format("%s has shape %s, but the model needs %s", describe(name).c_str(),
                       shape_text(tensor.shape).c_str(), shape_text(shape).c_str()));
  }
  return view(name);
}

std::string WeightStore::describe(std::string_view name) const {
  const Tensor& tensor = this->tensor(name);
  return format("tensor '%.*s' in %s", static_cast<int>(name.size()), name.data(),
                files_[static_cast<size_t>(tensor.file_idx)]->name().c_str());
}

void WeightStore::prefetch(ConstTensorView view) { prefetch_pages(view.data, view.bytes()); }
void WeightStore::drop_pages(ConstTensorView view) { forget_pages(view.data, view.bytes()); }

}  // namespace turbomind
