// Read-only file mappings of this process, and reading the files behind them. Bytes read through the
// descriptor cost a copy and no page faults, map nothing, and are an error instead of a fault where
// another process has cut the file. Linux lists mappings in /proc/self/maps; elsewhere none is found
// and callers read the memory itself. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"

namespace turbomind {

struct MappedRange {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  uint64_t offset = 0;  // of `begin` in the file
  uint64_t inode = 0;
  std::string path;

  bool contains(const void* data, size_t bytes) const {
    const uintptr_t first = reinterpret_cast<uintptr_t>(data);
    return first >= begin && first <= end && bytes <= end - first;
  }
};

// All that are readable, not writable, and of a named file.
std::vector<MappedRange> mapped_files();

// The file of one mapping, opened again under its name.
class MappingReader {
 public:
  MappingReader() = default;
  // Stays closed if the name now belongs to no file or to another one.
  explicit MappingReader(const MappedRange& mapping);
  ~MappingReader();
  MappingReader(MappingReader&& other) noexcept;
  MappingReader& operator=(MappingReader&& other) noexcept;

  bool is_open() const { return fd_ >= 0; }
  // Copies what lies at [data, data + bytes) of the mapping. False if the file cannot be read there
  // any more; answer with `file_changed_error`.
  [[nodiscard]] bool read(const void* data, size_t bytes, void* to) const;

 private:
  int fd_ = -1;
  uintptr_t begin_ = 0;
  uint64_t offset_ = 0;
};

Error file_changed_error(const char* what);

}  // namespace turbomind
