#include "backend/cuda/cuda_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>

namespace turbomind::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kSmallBytes = size_t{1} << 20;
constexpr size_t kSlabBytes = size_t{32} << 20;
constexpr size_t kBlockGranularity = size_t{2} << 20;
constexpr size_t kMaxCachedBytes = size_t{512} << 20;

constexpr size_t kMaxCopyThreads = 8;
constexpr size_t kLeastParallelBytes = size_t{1} << 20;

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallPage = 4096;
constexpr size_t kTouchBytes = size_t{32} << 20;
constexpr unsigned kTouchThreads = 4;

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

double gib(size_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

Error no_host_memory(size_t bytes, int code) {
  return Error(ErrorCode::out_of_memory,
               format("%.2f GiB of host memory: %s", gib(bytes), std::strerror(code)));
}

class LargeBuffer final : public Buffer {
 public:
  LargeBuffer(std::shared_ptr<DevicePool::State> state, DevicePool::Block block, size_t bytes)
      : state_(std::move(state)), block_(block), bytes_(bytes) {}
  ~LargeBuffer() override { state_->give(block_); }
  void* data() override { return block_.data; }
  size_t bytes() const override { return bytes_; }

 private:
  std::shared_ptr<DevicePool::State> state_;
  DevicePool::Block block_;
  size_t bytes_;
};

}  // namespace

void throw_cuda_error(cudaError_t status, const char* what, std::source_location where) {
  const std::string text = format("%s failed: %s (%s, %s:%u)", what, cudaGetErrorString(status),
                                  cudaGetErrorName(status), where.file_name(), where.line());
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // not sticky
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    throw Error(ErrorCode::out_of_memory, format("%s; %.2f of %.2f GiB of GPU memory are free",
                                                 text.c_str(), gib(free_bytes), gib(total_bytes)));
  }
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice ||
      status == cudaErrorInvalidDevice) {
    throw Error(ErrorCode::unsupported_device, text);
  }
  throw Error(ErrorCode::device_error, text);
}

// ---- pool ----------------------------------------------------------------------------------------

struct DevicePool::Slab {
  Slab(std::shared_ptr<State> owner, Block memory) : state(std::move(owner)), block(memory) {}
  ~Slab() { state->give(block); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  std::shared_ptr<State> state;
  Block block;
  size_t used = 0;
};

namespace {

template <class SlabPointer>
class SmallBuffer final : public Buffer {
 public:
  SmallBuffer(SlabPointer slab, void* data, size_t bytes)
      : slab_(std::move(slab)), data_(data), bytes_(bytes) {}
  void* data() override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  SlabPointer slab_;
  void* data_;
  size_t bytes_;
};

}  // namespace

DevicePool::State::~State() { release_all(); }

void DevicePool::State::release_all() {
  // The device may be lost or the driver shutting down: nothing useful can be done with an error.
  for (const auto& [bytes, data] : free_blocks) (void)cudaFree(data);
  free_blocks.clear();
  cached_bytes = 0;
}

DevicePool::Block DevicePool::State::take(size_t bytes) {
  const auto found = free_blocks.lower_bound(bytes);
  if (found != free_blocks.end() && found->first <= bytes + bytes / 4) {
    const Block block{found->second, found->first};
    cached_bytes -= block.bytes;
    bytes_in_use += block.bytes;
    free_blocks.erase(found);
    return block;
  }
  void* data = nullptr;
  cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation && !free_blocks.empty()) {
    (void)cudaGetLastError();
    release_all();
    status = cudaMalloc(&data, bytes);
  }
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    throw Error(ErrorCode::out_of_memory,
                format("GPU memory: %.3f GiB wanted, %.3f of %.3f GiB free (%.3f GiB held by this "
                       "pipeline); lower cacheMaxEntryCount, sessionLen or maxBatchSize, or free "
                       "the GPU",
                       gib(bytes), gib(free_bytes), gib(total_bytes), gib(bytes_in_use)));
  }
  cuda_check(status, "cudaMalloc");
  ++driver_allocations;
  bytes_in_use += bytes;
  return {static_cast<char*>(data), bytes};
}

void DevicePool::State::give(Block block) {
  bytes_in_use -= block.bytes;
  if (cached_bytes + block.bytes > kMaxCachedBytes) {
    (void)cudaFree(block.data);
    return;
  }
  cached_bytes += block.bytes;
  free_blocks.emplace(block.bytes, block.data);
}

size_t DevicePool::size_of(size_t bytes) {
  const size_t wanted = round_up(std::max<size_t>(bytes, 1), kAlignment);
  return wanted > kSmallBytes ? round_up(wanted, kBlockGranularity) : wanted;
}

size_t DevicePool::slab_bytes() { return kSlabBytes; }

std::unique_ptr<Buffer> DevicePool::allocate(size_t bytes) {
  const size_t wanted = size_of(bytes);
  if (wanted > kSmallBytes) {
    return std::make_unique<LargeBuffer>(state_, state_->take(wanted), bytes);
  }
  if (!slab_ || slab_->used + wanted > slab_->block.bytes) {
    slab_ = std::make_shared<Slab>(state_, state_->take(kSlabBytes));
  }
  char* data = slab_->block.data + slab_->used;
  slab_->used += wanted;
  return std::make_unique<SmallBuffer<std::shared_ptr<Slab>>>(slab_, data, bytes);
}

void DevicePool::trim() { state_->release_all(); }

// ---- host memory and events ----------------------------------------------------------------------

PinnedBuffer::PinnedBuffer(size_t bytes) : bytes_(bytes) {
  void* data = nullptr;
  cuda_check(cudaMallocHost(&data, std::max<size_t>(bytes, 1)), "allocating pinned host memory");
  data_ = static_cast<char*>(data);
}
PinnedBuffer::~PinnedBuffer() { (void)cudaFreeHost(data_); }

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

Event::~Event() {
  if (event_ != nullptr) (void)cudaEventDestroy(event_);
}
void Event::record(CudaStream stream) {
  if (event_ == nullptr) cuda_check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
  cuda_check(cudaEventRecord(event_, stream));
}
void Event::wait() {
  if (event_ != nullptr) cuda_check(cudaEventSynchronize(event_), "waiting for the GPU");
}

void Event::make_wait(CudaStream stream) {
  if (event_ != nullptr) cuda_check(cudaStreamWaitEvent(stream, event_), "ordering two streams");
}

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
