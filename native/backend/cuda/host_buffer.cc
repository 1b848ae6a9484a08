#include "backend/cuda/host_buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/start_threads.h"

namespace turbomind::cuda {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallPage = 4096;
constexpr size_t kTouchBytes = size_t{32} << 20;
constexpr unsigned kTouchThreads = 4;

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

Error no_host_memory(size_t bytes, int code) {
  return Error(ErrorCode::out_of_memory,
               format("%.2f GiB of host memory: %s", static_cast<double>(bytes) / (1 << 30),
                      std::strerror(code)));
}

}  // namespace

HostBuffer::HostBuffer(size_t bytes) : bytes_(bytes) {
  mapped_bytes_ = round_up(std::max<size_t>(bytes, 1), kHugePage) + kHugePage;
  void* mapping =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw no_host_memory(bytes, errno);
  mapping_ = static_cast<char*>(mapping);
  data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(mapping_), kHugePage));
  (void)madvise(data_, mapped_bytes_ - kHugePage, MADV_HUGEPAGE);  // a hint
  try {
    touch();
    pin();
  } catch (...) {
    (void)munmap(mapping_, mapped_bytes_);
    throw;
  }
}

HostBuffer::~HostBuffer() {
  if (pinned_) (void)cudaHostUnregister(data_);
  (void)munmap(mapping_, mapped_bytes_);
}

// Writes to every page.
void HostBuffer::touch() const {
  std::atomic<size_t> next = 0;
  std::atomic<int> failure = 0;
  const auto run = [&] {
    while (failure == 0) {
      const size_t begin = next.fetch_add(kTouchBytes);
      if (begin >= mapped_bytes_ - kHugePage) return;
      const size_t bytes = std::min(kTouchBytes, mapped_bytes_ - kHugePage - begin);
      if (madvise(data_ + begin, bytes, MADV_POPULATE_WRITE) == 0) continue;
      if (errno == ENOMEM) {
        failure = errno;
        return;
      }
      volatile char* page = data_ + begin;  // Linux before 5.14 has no such advice
      for (size_t i = 0; i < bytes; i += kSmallPage) page[i] = 0;
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(kTouchThreads);
  start_threads(helpers, std::clamp(std::thread::hardware_concurrency(), 1U, kTouchThreads) - 1,
                [&](size_t) { return run; });
  run();
  for (std::thread& helper : helpers) helper.join();
  if (failure != 0) throw no_host_memory(bytes_, failure);
}

void HostBuffer::pin() {
  const cudaError_t status =
      cudaHostRegister(data_, std::max<size_t>(bytes_, 1), cudaHostRegisterDefault);
  pinned_ = status == cudaSuccess;
  if (status == cudaErrorMemoryAllocation) cuda_check(status, "pinning host memory");
  if (!pinned_) (void)cudaGetLastError();
}

}  // namespace turbomind::cuda
