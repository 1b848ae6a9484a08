#include "backend/cuda/staged_upload.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/start_threads.h"

namespace turbomind::cuda {
namespace {

constexpr size_t kMaxCopyThreads = 8;
constexpr size_t kLeastParallelBytes = size_t{1} << 20;

}  // namespace

ParallelCopy::ParallelCopy() {
  const size_t most = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, kMaxCopyThreads);
  start_threads(helpers_, most - 1, [this](size_t i) { return [this, i] { work(i + 1); }; });
  parts_ = helpers_.size() + 1;
}

ParallelCopy::~ParallelCopy() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ParallelCopy::copy(char* to, const char* from, size_t bytes) {
  if (bytes < kLeastParallelBytes || helpers_.empty()) {
    std::memcpy(to, from, bytes);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    to_ = to;
    from_ = from;
    bytes_ = bytes;
    running_ = helpers_.size();
    ++generation_;
  }
  changed_.notify_all();
  copy_part(0);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return running_ == 0; });
}

void ParallelCopy::work(size_t part) {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return ending_ || generation_ != seen; });
    if (ending_) return;
    seen = generation_;
    lock.unlock();
    copy_part(part);
    lock.lock();
    if (--running_ == 0) changed_.notify_all();
  }
}

void ParallelCopy::copy_part(size_t part) const {
  const size_t begin = bytes_ * part / parts_;
  const size_t end = bytes_ * (part + 1) / parts_;
  std::memcpy(to_ + begin, from_ + begin, end - begin);
}

StagedUpload::StagedUpload(size_t half_bytes)
    : halves_{PinnedBuffer(half_bytes), PinnedBuffer(half_bytes)} {}

void StagedUpload::copy(void* device, const void* host, size_t bytes, CudaStream stream) {
  size_t done = 0;
  while (done < bytes) {
    PinnedBuffer& half = halves_[next_];
    const size_t piece = std::min(half.bytes(), bytes - done);
    done_[next_].wait();
    copier_.copy(half.data(), static_cast<const char*>(host) + done, piece);
    cuda_check(cudaMemcpyAsync(static_cast<char*>(device) + done, half.data(), piece,
                               cudaMemcpyHostToDevice, stream),
               "uploading");
    done_[next_].record(stream);
    next_ = 1 - next_;
    done += piece;
  }
}

}  // namespace turbomind::cuda
