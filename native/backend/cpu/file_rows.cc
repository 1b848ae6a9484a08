// Finds a mapping's file in /proc/self/maps; see the header.
#include "backend/cpu/file_rows.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace turbomind::cpu {
namespace {

#if defined(__linux__)
struct Place {
  int fd = -1;
  int64_t offset = 0;
};

// Opens the file mapped at [begin, end), if it is one, under its name and still the same inode.
Place open_mapped_file(uintptr_t begin, uintptr_t end) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return {};
  Place place;
  char* line = nullptr;
  size_t capacity = 0;
  while (place.fd < 0 && getline(&line, &capacity, maps) > 0) {
    unsigned long first = 0, last = 0, offset = 0, inode = 0;
    char access[5] = {};
    int name = 0;
    if (std::sscanf(line, "%lx-%lx %4s %lx %*s %lu %n", &first, &last, access, &offset, &inode,
                    &name) < 5) {
      continue;
    }
    if (begin < first || end > last || access[1] == 'w' || inode == 0 || name == 0) continue;
    std::string path(line + name);
    while (!path.empty() && path.back() == '\n') path.pop_back();
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) break;
    struct stat status {};
    if (fstat(fd, &status) != 0 || status.st_ino != inode) {
      close(fd);
      break;
    }
    place = {fd, static_cast<int64_t>(offset + (begin - first))};
  }
  std::free(line);
  std::fclose(maps);
  return place;
}
#endif

}  // namespace

FileRows::FileRows(const void* table, size_t bytes) : table_(static_cast<const uint8_t*>(table)) {
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(table);
  const Place place = open_mapped_file(begin, begin + bytes);
  fd_ = place.fd;
  begin_ = place.offset;
#else
  (void)bytes;
#endif
}

FileRows::~FileRows() {
#if defined(__linux__)
  if (fd_ >= 0) close(fd_);
#endif
}

FileRows::FileRows(FileRows&& other) noexcept
    : table_(other.table_), fd_(std::exchange(other.fd_, -1)), begin_(other.begin_) {}

FileRows& FileRows::operator=(FileRows&& other) noexcept {
  std::swap(table_, other.table_);
  std::swap(fd_, other.fd_);
  std::swap(begin_, other.begin_);
  return *this;
}

bool FileRows::read(size_t offset, size_t bytes, void* to) const {
  if (fd_ < 0) {
    std::memcpy(to, table_ + offset, bytes);
    return true;
  }
#if defined(__linux__)
  size_t done = 0;
  while (done < bytes) {
    const ssize_t count = pread(fd_, static_cast<char*>(to) + done, bytes - done,
                                static_cast<off_t>(begin_ + static_cast<int64_t>(offset + done)));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    done += static_cast<size_t>(count);
  }
#endif
  return true;
}

Error file_changed_error(const char* what) {
  return Error(
      ErrorCode::invalid_checkpoint,
      format("%s cannot be read from the weight file any more: it was changed or cut while "
             "in use; keep model files unchanged while a pipeline is open",
             what));
}

}  // namespace turbomind::cpu
