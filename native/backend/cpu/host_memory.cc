// See host_memory.h. The only file of the CPU backend that talks to the system about memory.
#include "backend/cpu/host_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "base/error.h"

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define TM_HAS_MMAP 1
#else
#define TM_HAS_MMAP 0
#endif

namespace turbomind::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMapThreshold = size_t{1} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

#if TM_HAS_MMAP

#if defined(MADV_HUGEPAGE)
void ask_for_huge_pages(void* data, size_t bytes) { madvise(data, bytes, MADV_HUGEPAGE); }
#else
void ask_for_huge_pages(void*, size_t) {}
#endif

// Over-maps and trims so that a large block starts on a huge-page border.
void* map_block(size_t bytes, size_t* mapped_bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t size = round_up(bytes, page);
  const bool huge = size >= kHugePage;
  const size_t wanted = huge ? size + kHugePage : size;
  if (wanted < bytes) return nullptr;
  void* raw = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* data = static_cast<char*>(raw);
  if (huge) {
    const size_t skip = round_up(reinterpret_cast<uintptr_t>(raw), uintptr_t{kHugePage}) -
                        reinterpret_cast<uintptr_t>(raw);
    if (skip > 0) munmap(data, skip);
    munmap(data + skip + size, kHugePage - skip);
    data += skip;
    ask_for_huge_pages(data, size);
  }
  *mapped_bytes = size;
  return data;
}

void unmap_block(void* data, size_t mapped_bytes) { munmap(data, mapped_bytes); }

size_t machine_bytes() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

#else

void* map_block(size_t bytes, size_t* mapped_bytes) {
  *mapped_bytes = 0;
  return ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
}
void unmap_block(void*, size_t) {}
size_t machine_bytes() { return 0; }

#endif

// First number of a one-line file, or of the line that starts with `key`; `missing` otherwise
// (also for cgroup's "max").
size_t read_number(const char* path, const char* key, size_t missing) {
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return missing;
  char line[256];
  size_t value = missing;
  const size_t key_length = std::strlen(key);
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::strncmp(line, key, key_length) != 0) continue;
    char* end = nullptr;
    const unsigned long long number = std::strtoull(line + key_length, &end, 10);
    if (end != line + key_length) value = static_cast<size_t>(number);
    break;
  }
  std::fclose(file);
  return value;
}

}  // namespace

HostMemory::HostMemory(size_t bytes, const char* purpose) {
  const size_t wanted = std::max(bytes, kAlignment);
  data_ = wanted >= kMapThreshold
              ? map_block(wanted, &mapped_bytes_)
              : ::operator new(wanted, std::align_val_t{kAlignment}, std::nothrow);
  if (data_ == nullptr) {
    const MemoryInfo memory = memory_info();
    throw Error(ErrorCode::out_of_memory,
                format("cannot allocate %.1f MiB for %s: %.1f of %.1f MiB are free; lower "
                       "sessionLen, maxBatchSize or cacheMaxEntryCount",
                       static_cast<double>(bytes) / 1048576.0, purpose,
                       static_cast<double>(memory.free_bytes) / 1048576.0,
                       static_cast<double>(memory.total_bytes) / 1048576.0));
  }
  bytes_ = bytes;
}

void HostMemory::release() noexcept {
  if (data_ == nullptr) return;
  if (mapped_bytes_ > 0) {
    unmap_block(data_, mapped_bytes_);
  } else {
    ::operator delete(data_, std::align_val_t{kAlignment});
  }
  data_ = nullptr;
  bytes_ = mapped_bytes_ = 0;
}

MemoryInfo memory_info() {
  constexpr size_t kNoLimit = SIZE_MAX;
  MemoryInfo info;
  info.total_bytes = machine_bytes();
  const size_t available_kib = read_number("/proc/meminfo", "MemAvailable:", kNoLimit);
  info.free_bytes = available_kib == kNoLimit ? info.total_bytes / 2 : available_kib * 1024;
  // cgroup v2, then v1. Page cache counts as used there, but is given back under pressure.
  size_t limit = read_number("/sys/fs/cgroup/memory.max", "", kNoLimit);
  size_t used = read_number("/sys/fs/cgroup/memory.current", "", 0);
  size_t cache = read_number("/sys/fs/cgroup/memory.stat", "inactive_file ", 0);
  if (limit == kNoLimit) {
    limit = read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes", "", kNoLimit);
    used = read_number("/sys/fs/cgroup/memory/memory.usage_in_bytes", "", 0);
    cache = read_number("/sys/fs/cgroup/memory/memory.stat", "total_inactive_file ", 0);
  }
  if (limit < info.total_bytes) {
    used -= std::min(used, cache);
    info.total_bytes = limit;
    info.free_bytes = std::min(info.free_bytes, limit - std::min(limit, used));
  }
  return info;
}

}  // namespace turbomind::cpu
