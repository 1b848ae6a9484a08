// Packed-weight pages and checkpoint page hints, see the header. Linux does all of it; elsewhere
// the hints do nothing.
#include "backend/cpu/mapped_memory.h"

#include <algorithm>
#include <cstdlib>

#include "base/error.h"
#include "base/file_mapping.h"
#include "base/types.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace turbomind::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

[[noreturn]] void no_memory(size_t bytes) {
  throw Error(
      ErrorCode::out_of_memory,
      format("cannot allocate %zu bytes for packed weights; free memory or use a smaller model",
             bytes));
}

#if defined(__linux__)
size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Address space is reserved with room to align, then trimmed to whole small pages: the kernel backs
// every aligned 2 MB with one huge page and the rest with small ones, so nothing is wasted.
uint8_t* map_pages(size_t bytes) {
  const size_t length = round_up(bytes, page_bytes());
  const size_t reserved = length + kHugePage;
  void* raw = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) no_memory(bytes);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = round_up(begin, static_cast<uintptr_t>(kHugePage));
  if (aligned > begin) munmap(raw, aligned - begin);
  const uintptr_t end = begin + reserved;
  if (end > aligned + length)
    munmap(reinterpret_cast<void*>(aligned + length), end - aligned - length);
  void* data = reinterpret_cast<void*>(aligned);
  if (length >= kHugePage)
    madvise(data, length, MADV_HUGEPAGE);  // a hint: refusal costs speed only
  return static_cast<uint8_t*>(data);
}

void unmap_pages(uint8_t* data, size_t bytes) { munmap(data, round_up(bytes, page_bytes())); }
#else
uint8_t* map_pages(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) no_memory(bytes);
  std::fill_n(static_cast<uint8_t*>(data), bytes, uint8_t{0});
  return static_cast<uint8_t*>(data);
}

void unmap_pages(uint8_t* data, size_t) { std::free(data); }
#endif

}  // namespace

MappedMemory::MappedMemory(size_t bytes)
    : data_(bytes > 0 ? map_pages(bytes) : nullptr), bytes_(bytes) {}

MappedMemory::~MappedMemory() {
  if (data_ != nullptr) unmap_pages(data_, bytes_);
}

MappedMemory::MappedMemory(MappedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

MappedMemory& MappedMemory::operator=(MappedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

SourcePages::SourcePages(const std::vector<std::pair<const void*, size_t>>& ranges) {
  for (const MappedRange& file : mapped_files()) {
    const bool wanted = std::any_of(ranges.begin(), ranges.end(), [&](const auto& range) {
      const uintptr_t first = reinterpret_cast<uintptr_t>(range.first);
      return first < file.end && first + range.second > file.begin;
    });
    if (wanted) files_.emplace_back(file.begin, file.end);
  }
}

bool SourcePages::droppable(uintptr_t begin, uintptr_t end) const {
  return std::any_of(files_.begin(), files_.end(),
                     [&](const auto& file) { return begin >= file.first && end <= file.second; });
}

void SourcePages::will_read(const void* data, size_t bytes) const {
#if defined(__linux__) && defined(MADV_POPULATE_READ)
  if (files_.empty() || bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(page_bytes() - 1);
  const uintptr_t end = round_up(reinterpret_cast<uintptr_t>(data) + bytes, page_bytes());
  if (droppable(begin, end))
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_READ);
#else
  (void)data, (void)bytes;
#endif
}

void SourcePages::done_with(const void* data, size_t bytes) const {
#if defined(__linux__)
  if (files_.empty()) return;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(data), page_bytes());
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page_bytes() - 1);
  if (begin < end && droppable(begin, end)) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace turbomind::cpu
