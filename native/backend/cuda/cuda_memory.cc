#include "backend/cuda/cuda_memory.h"

#include <algorithm>

namespace turbomind::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kSmallBytes = size_t{1} << 20;
constexpr size_t kSlabBytes = size_t{32} << 20;
constexpr size_t kBlockGranularity = size_t{2} << 20;
constexpr size_t kMaxCachedBytes = size_t{512} << 20;

double gib(size_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

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

PinnedBuffer::PinnedBuffer(size_t bytes) : bytes_(bytes) {
  void* data = nullptr;
  cuda_check(cudaMallocHost(&data, std::max<size_t>(bytes, 1)), "allocating pinned host memory");
  data_ = static_cast<char*>(data);
}
PinnedBuffer::~PinnedBuffer() { (void)cudaFreeHost(data_); }

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

}  // namespace turbomind::cuda
