// Device memory, pinned staging and the events that guard it. One backend's engine thread.
// The pool keeps freed blocks for the next request of that size, so that a steady step reaches
// neither cudaMalloc nor cudaFree; `driver_allocations` counts the calls that do.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/cuda_check.h"

namespace turbomind::cuda {

// Starts up to `count` threads, which run what body(0), body(1) and so on answer; fewer where the system
// gives no more.
template <class Body>
void start_threads(std::vector<std::thread>& threads, size_t count, Body&& body) {
  threads.reserve(count);
  try {
    for (size_t i = 0; i < count; ++i) threads.emplace_back(body(i));
  } catch (const std::system_error&) {
    return;  // those that run are joined by whoever owns them
  }
}

class DevicePool {
 public:
  DevicePool() : state_(std::make_shared<State>()) {}
  // 256-byte aligned, unspecified contents. Throws Error{out_of_memory} with the numbers.
  std::unique_ptr<Buffer> allocate(size_t bytes);
  size_t driver_allocations() const { return state_->driver_allocations; }
  size_t bytes_in_use() const { return state_->bytes_in_use; }
  void trim();  // gives cached blocks back to the driver
  // What allocate(bytes) takes, but for the unused end of a slab of small buffers.
  static size_t size_of(size_t bytes);
  static size_t slab_bytes();

  struct Block {
    char* data = nullptr;
    size_t bytes = 0;
  };
  // Outlives the pool while buffers do: they may be destroyed after the backend.
  struct State {
    std::multimap<size_t, char*> free_blocks;
    size_t cached_bytes = 0;
    size_t bytes_in_use = 0;
    size_t driver_allocations = 0;
    ~State();
    Block take(size_t bytes);
    void give(Block block);
    void release_all();
  };

 private:
  struct Slab;  // many small buffers in one driver allocation
  std::shared_ptr<State> state_;
  std::shared_ptr<Slab> slab_;
};

// Host memory that the copy engines read and write directly.
class PinnedBuffer {
 public:
  explicit PinnedBuffer(size_t bytes);
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

// Much host memory at once, pinned. Several threads touch its pages, huge ones where the system has them,
// before the driver pins them: while it takes fresh small pages one by one, a quarter of a second for a
// GiB, it serves nobody else, and loading beside it waits.
class HostBuffer final : public Buffer {
 public:
  // The device must be current. Where pinning is refused for another reason than memory the pages stay as
  // they are: copies are right, but slower, and wait. Throws Error{out_of_memory}.
  explicit HostBuffer(size_t bytes);
  ~HostBuffer() override;
  void* data() override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  void touch() const;
  void pin();

  char* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
  char* data_ = nullptr;
  size_t bytes_ = 0;
  bool pinned_ = false;
};

class CudaStreamOwner {
 public:
  CudaStreamOwner() { cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~CudaStreamOwner() { (void)cudaStreamDestroy(stream_); }
  CudaStreamOwner(const CudaStreamOwner&) = delete;
  CudaStreamOwner& operator=(const CudaStreamOwner&) = delete;
  CudaStream get() const { return stream_; }

 private:
  CudaStream stream_ = nullptr;
};

class Event {
 public:
  Event() = default;
  ~Event();
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  void record(CudaStream stream);
  void wait();                        // returns at once if never recorded
  void make_wait(CudaStream stream);  // what `stream` gets from now on runs after the record

 private:
  cudaEvent_t event_ = nullptr;
};

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
