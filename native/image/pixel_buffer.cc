#include "image/pixel_buffer.h"

#include <cstdint>

#include "base/types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace turbomind::image {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  // Whole huge pages within the range; the ragged ends stay as they are.
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(memory), kHugePage);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace turbomind::image
