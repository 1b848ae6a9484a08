// Host memory of preempted requests: much of it, taken at load. Made on any thread, used by the engine's.
#pragma once

#include <cstddef>

#include "backend/backend.h"

namespace turbomind::cuda {

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

}  // namespace turbomind::cuda
