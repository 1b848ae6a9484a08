#include "base/file_mapping.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <utility>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace turbomind {

#if defined(__linux__)
std::vector<MappedRange> mapped_files() {
  std::vector<MappedRange> mappings;
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return mappings;
  char* line = nullptr;
  size_t capacity = 0;
  while (getline(&line, &capacity, maps) > 0) {
    unsigned long begin = 0, end = 0, offset = 0, inode = 0;
    char access[5] = {};
    int name = 0;
    if (std::sscanf(line, "%lx-%lx %4s %lx %*s %lu %n", &begin, &end, access, &offset, &inode,
                    &name) < 5) {
      continue;
    }
    if (access[0] != 'r' || access[1] == 'w' || inode == 0 || name == 0) continue;
    std::string path(line + name);
    while (!path.empty() && path.back() == '\n') path.pop_back();
    if (!path.empty()) mappings.push_back({begin, end, offset, inode, std::move(path)});
  }
  std::free(line);
  std::fclose(maps);
  return mappings;
}

MappingReader::MappingReader(const MappedRange& mapping)
    : begin_(mapping.begin), offset_(mapping.offset) {
  fd_ = open(mapping.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat status {};
  if (fd_ >= 0 && (fstat(fd_, &status) != 0 || status.st_ino != mapping.inode)) {
    close(fd_);
    fd_ = -1;
  }
}

MappingReader::~MappingReader() {
  if (fd_ >= 0) close(fd_);
}

bool MappingReader::read(const void* data, size_t bytes, void* to) const {
  const uint64_t from = offset_ + (reinterpret_cast<uintptr_t>(data) - begin_);
  size_t done = 0;
  while (done < bytes) {
    const ssize_t count =
        pread(fd_, static_cast<char*>(to) + done, bytes - done, static_cast<off_t>(from + done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    done += static_cast<size_t>(count);
  }
  return true;
}
#else
std::vector<MappedRange> mapped_files() { return {}; }
MappingReader::MappingReader(const MappedRange&) {}
MappingReader::~MappingReader() = default;
bool MappingReader::read(const void*, size_t, void*) const { return false; }
#endif

MappingReader::MappingReader(MappingReader&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), begin_(other.begin_), offset_(other.offset_) {}

MappingReader& MappingReader::operator=(MappingReader&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(begin_, other.begin_);
  std::swap(offset_, other.offset_);
  return *this;
}

Error file_changed_error(const char* what) {
  return Error(
      ErrorCode::invalid_checkpoint,
      format("%s cannot be read from the weight file any more: it was changed or cut while "
             "in use; keep model files unchanged while a pipeline is open",
             what));
}

}  // namespace turbomind
