// See host_memory.h. The only file of the CPU backend that takes memory of the system.
#include "backend/cpu/host_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "base/error.h"
#include "base/host_memory_info.h"

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

#else

void* map_block(size_t bytes, size_t* mapped_bytes) {
  *mapped_bytes = 0;
  return ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
}
void unmap_block(void*, size_t) {}

#endif

}  // namespace

HostMemory::HostMemory(size_t bytes, const char* purpose) {
  const size_t wanted = std::max(bytes, kAlignment);
  data_ = wanted >= kMapThreshold
              ? map_block(wanted, &mapped_bytes_)
              : ::operator new(wanted, std::align_val_t{kAlignment}, std::nothrow);
  if (data_ == nullptr) {
    const HostMemoryInfo memory = host_memory_info();
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

}  // namespace turbomind::cpu
