// Memory of the CPU backend: one RAII block, 64-byte aligned. Large blocks come straight from the
// system, ask for huge pages and are touched lazily: what is never written costs no RAM, and all of
// it returns to the system when the block dies. Engine thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <utility>

#include "backend/backend.h"

namespace turbomind::cpu {

class HostMemory {
 public:
  HostMemory() = default;
  // Throws Error{out_of_memory} naming `purpose`. Large blocks start as zeros, small ones do not.
  HostMemory(size_t bytes, const char* purpose);
  ~HostMemory() { release(); }
  HostMemory(HostMemory&& other) noexcept { swap(other); }
  HostMemory& operator=(HostMemory&& other) noexcept {
    swap(other);
    return *this;
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  size_t bytes() const { return bytes_; }
  // Makes room for `bytes`; old content is lost when it has to grow.
  void reserve(size_t bytes, const char* purpose) {
    if (bytes > bytes_) *this = HostMemory(bytes, purpose);
  }

 private:
  void swap(HostMemory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
  }
  void release() noexcept;

  void* data_ = nullptr;
  size_t bytes_ = 0;
  size_t mapped_bytes_ = 0;  // 0: from the allocator
};

// Sum of the bytes that a backend's live objects hold. The objects may outlive the backend.
using MemoryMeter = std::shared_ptr<std::atomic<size_t>>;

// An object's share of a meter: counted while it lives.
class Metered {
 public:
  Metered() = default;
  Metered(MemoryMeter meter, size_t bytes) : meter_(std::move(meter)), bytes_(bytes) {
    if (meter_) meter_->fetch_add(bytes_, std::memory_order_relaxed);
  }
  ~Metered() {
    if (meter_) meter_->fetch_sub(bytes_, std::memory_order_relaxed);
  }
  Metered(Metered&& other) noexcept { swap(other); }
  Metered& operator=(Metered&& other) noexcept {
    swap(other);
    return *this;
  }

 private:
  void swap(Metered& other) noexcept {
    std::swap(meter_, other.meter_);
    std::swap(bytes_, other.bytes_);
  }

  MemoryMeter meter_;
  size_t bytes_ = 0;
};

class HostBuffer : public Buffer {
 public:
  HostBuffer(size_t bytes, const char* purpose, MemoryMeter meter = nullptr)
      : memory_(bytes, purpose), metered_(std::move(meter), bytes) {}
  void* data() override { return memory_.data(); }
  size_t bytes() const override { return memory_.bytes(); }

 private:
  HostMemory memory_;
  Metered metered_;
};

}  // namespace turbomind::cpu
