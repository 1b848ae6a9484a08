// One file mapped read-only. Owns the descriptor and the mapping; knows nothing of tensors. The
// descriptor stays open so that the size can be asked again: reading past the end of a file that
// somebody truncates would be a SIGBUS, not an error. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace turbomind {

class MappedFile {
 public:
  // Throws Error{invalid_checkpoint} when the file is missing, not regular, or cannot be mapped.
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  std::string name() const;                  // without folders, for messages
  uint64_t bytes() const { return bytes_; }  // mapped
  uint64_t current_bytes() const;            // of the file now
  const std::byte* data() const { return data_; }

 private:
  std::string path_;
  int descriptor_ = -1;
  uint64_t bytes_ = 0;
  const std::byte* data_ = nullptr;
};

// Zeroed page-aligned memory whose contents outlive "forget these pages" advice, unlike ordinary
// private memory: views of it may be treated as views of a mapped file.
class SharedPages {
 public:
  explicit SharedPages(size_t bytes);  // throws Error{out_of_memory}
  ~SharedPages();
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;
  std::byte* data() { return data_; }

 private:
  size_t bytes_ = 0;
  std::byte* data_ = nullptr;
};

// Read-ahead of the pages that touch [data, data + bytes); a hint.
void prefetch_pages(const void* data, size_t bytes);
// Forgets the whole pages inside [data, data + bytes); a hint.
void forget_pages(const void* data, size_t bytes);

}  // namespace turbomind
