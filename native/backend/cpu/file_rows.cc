#include "backend/cpu/file_rows.h"

#include <cstring>

namespace turbomind::cpu {

FileRows::FileRows(const void* table, size_t bytes) : table_(static_cast<const uint8_t*>(table)) {
  for (const MappedRange& file : mapped_files()) {
    if (file.contains(table, bytes)) reader_ = MappingReader(file);
  }
}

bool FileRows::read(size_t offset, size_t bytes, void* to) const {
  if (reader_.is_open()) return reader_.read(table_ + offset, bytes, to);
  std::memcpy(to, table_ + offset, bytes);
  return true;
}

}  // namespace turbomind::cpu
