#include "image/pixel_buffer.h"

#include <cstdlib>

#include "base/error.h"
#include "base/types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace turbomind::image {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

std::shared_ptr<uint8_t> allocate_pixels(size_t bytes) {
  // Small images come from the heap as they are; large ones begin where a huge page can.
  const bool large = bytes >= 2 * kHugePage;
  const size_t alignment = large ? kHugePage : 64;
  void* memory = std::aligned_alloc(alignment, round_up(bytes + (bytes == 0 ? 1 : 0), alignment));
  if (memory == nullptr) {
    throw Error(ErrorCode::out_of_memory,
                format("image: no memory for %zu bytes of pixels", bytes));
  }
  if (large) prefer_huge_pages(memory, bytes);
  return {static_cast<uint8_t*>(memory), [](uint8_t* pixels) { std::free(pixels); }};
}

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
