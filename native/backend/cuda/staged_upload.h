// Pageable host memory to the device, through pinned halves. One backend's engine thread.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "backend/cuda/cuda_memory.h"

namespace turbomind::cuda {

// Copies memory with several threads: page faults of a mapped file hold one thread to a few GB/s.
class ParallelCopy {
 public:
  ParallelCopy();
  ~ParallelCopy();
  ParallelCopy(const ParallelCopy&) = delete;
  ParallelCopy& operator=(const ParallelCopy&) = delete;
  void copy(char* to, const char* from, size_t bytes);  // one caller at a time

 private:
  void work(size_t part);
  void copy_part(size_t part) const;

  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t generation_ = 0;  // of the copy at hand; helpers wait for the next
  size_t running_ = 0;       // helpers that have not finished their part
  bool ending_ = false;
  char* to_ = nullptr;
  const char* from_ = nullptr;
  size_t bytes_ = 0;
  size_t parts_ = 1;  // helpers and the caller
  std::vector<std::thread> helpers_;
};

// Copies pageable host memory (a mapped file) to the device through two pinned halves: the CPU fills
// one while the copy engine empties the other. Returns once the source has been read.
class StagedUpload {
 public:
  explicit StagedUpload(size_t half_bytes);
  void copy(void* device, const void* host, size_t bytes, CudaStream stream);

 private:
  ParallelCopy copier_;
  PinnedBuffer halves_[2];
  Event done_[2];
  int next_ = 0;
};

}  // namespace turbomind::cuda
