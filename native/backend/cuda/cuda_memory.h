// Device memory, pinned staging, streams and the events that guard them. One backend's engine thread.
// The pool keeps freed blocks for the next request of that size, so that a steady step reaches
// neither cudaMalloc nor cudaFree; `driver_allocations` counts the calls that do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "backend/backend.h"
#include "backend/cuda/cuda_check.h"

namespace turbomind::cuda {

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

}  // namespace turbomind::cuda
