// Single rows of a big table that lies in a mapped file. Reading a row through the mapping makes the
// kernel map the whole page-cache folio around it (a megabyte and more was seen for 1.8 kB), which
// then counts as resident; read through the file descriptor it costs a copy and no memory, and a
// file cut short by another process is an error instead of a fault. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/file_mapping.h"

namespace turbomind::cpu {

class FileRows {
 public:
  FileRows() = default;
  // The table's first byte and size. If it is not a read-only mapping of a file that can still be
  // opened under its name, rows are copied from memory.
  FileRows(const void* table, size_t bytes);

  // Copies [offset, offset + bytes) of the table. False if the file cannot be read there any more:
  // answer with `file_changed_error` outside of the thread pool.
  [[nodiscard]] bool read(size_t offset, size_t bytes, void* to) const;

 private:
  const uint8_t* table_ = nullptr;
  MappingReader reader_;
};

}  // namespace turbomind::cpu
