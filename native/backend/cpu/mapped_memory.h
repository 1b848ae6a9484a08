// Memory for packed weights (whole pages, huge where they fit) and hints about the pages of a
// checkpoint while it is read. Host side, any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace turbomind::cpu {

// Zeroed, 2 MB aligned; freed with its owner. Throws Error{out_of_memory}.
class MappedMemory {
 public:
  MappedMemory() = default;
  explicit MappedMemory(size_t bytes);
  ~MappedMemory();
  MappedMemory(MappedMemory&& other) noexcept;
  MappedMemory& operator=(MappedMemory&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;  // asked for
};

// The parts of the source that may be dropped once read: read-only file mappings. Anything else (a
// caller's heap) is never touched, for there dropping a page would clear it.
class SourcePages {
 public:
  explicit SourcePages(const std::vector<std::pair<const void*, size_t>>& ranges);
  // Maps [data, data + bytes) in one go instead of one fault per 64 kB.
  void will_read(const void* data, size_t bytes) const;
  // Forgets the whole pages inside the range; their contents stay in the file cache.
  void done_with(const void* data, size_t bytes) const;

 private:
  bool droppable(uintptr_t begin, uintptr_t end) const;
  std::vector<std::pair<uintptr_t, uintptr_t>> files_;  // read-only file mappings over the ranges
};

}  // namespace turbomind::cpu
