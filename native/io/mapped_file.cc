// POSIX mapping. Another system needs another file like this one, nothing else.
#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>

#include "base/error.h"

namespace turbomind {
namespace {

Error file_error(const std::string& path, const char* what, int error) {
  return Error(ErrorCode::invalid_checkpoint,
               format("%s: %s: %s", path.c_str(), what, std::strerror(error)));
}

uintptr_t page_bytes() { return static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a pipe by mistake must answer, not wait for a writer.
  descriptor_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) throw file_error(path_, "cannot open the weight file", errno);
  struct stat info {};
  const int stat_error = fstat(descriptor_, &info) == 0 ? 0 : errno;
  if (stat_error != 0 || !S_ISREG(info.st_mode) || info.st_size <= 0) {
    close(descriptor_);
    if (stat_error != 0)
      throw file_error(path_, "cannot read the size of the weight file", stat_error);
    throw Error(ErrorCode::invalid_checkpoint,
                format("%s: %s; expected a safetensors file", path_.c_str(),
                       S_ISREG(info.st_mode) ? "the file is empty" : "not a regular file"));
  }
  bytes_ = static_cast<uint64_t>(info.st_size);
  void* mapping = MAP_FAILED;
  int map_error = EFBIG;
  if (bytes_ <= std::numeric_limits<size_t>::max()) {
    mapping = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ, MAP_PRIVATE, descriptor_, 0);
    map_error = errno;
  }
  if (mapping == MAP_FAILED) {
    close(descriptor_);
    throw file_error(path_, "cannot map the weight file", map_error);
  }
  data_ = static_cast<const std::byte*>(mapping);
}

MappedFile::~MappedFile() {
  munmap(const_cast<std::byte*>(data_), static_cast<size_t>(bytes_));
  close(descriptor_);
}

std::string MappedFile::name() const {
  const size_t slash = path_.find_last_of('/');
  return slash == std::string::npos ? path_ : path_.substr(slash + 1);
}

uint64_t MappedFile::current_bytes() const {
  struct stat info {};
  return fstat(descriptor_, &info) == 0 && info.st_size > 0 ? static_cast<uint64_t>(info.st_size)
                                                            : 0;
}

SharedPages::SharedPages(size_t bytes) : bytes_(bytes) {
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    throw Error(
        ErrorCode::out_of_memory,
        format("cannot allocate %zu bytes for a copy of an unaligned tensor; free memory", bytes));
  }
  data_ = static_cast<std::byte*>(mapping);
}

SharedPages::~SharedPages() { munmap(data_, bytes_); }

void prefetch_pages(const void* data, size_t bytes) {
  if (bytes == 0) return;
  const uintptr_t page = page_bytes();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
}

void forget_pages(const void* data, size_t bytes) {
  const uintptr_t page = page_bytes();
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace turbomind
