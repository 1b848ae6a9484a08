#include "backend/cuda/cuda_upload.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/start_threads.h"

namespace turbomind::cuda {
namespace {

// On an H100's host eight threads fill PCIe 5 (reading 50 GB/s, 49 with the upload beside it; twelve read
// 73, but then the two share memory's bandwidth less well: 44). A disk is busy with fewer.
constexpr unsigned kMaxThreads = 8;
constexpr int kSlotsPerThread = 2;  // one is read into while the other is copied
// Groups under way: those of a matrix, and those of a vector, which would otherwise take its place.
constexpr size_t kLargeRegions = 3;
constexpr size_t kSmallRegions = 8;
constexpr size_t kSmallBytes = size_t{2} << 20;  // no part of the pool's slabs: all is given back

}  // namespace

ReadQueue::ReadQueue(int device) : device_(device) {
  const unsigned threads = std::clamp(std::thread::hardware_concurrency(), 2U, kMaxThreads);
  start_threads(threads_, threads, [this](size_t) { return [this] { work(); }; });
  if (threads_.empty()) {
    throw Error(ErrorCode::out_of_memory,
                "loading: the system gives no thread to read with; allow the process more");
  }
}

ReadQueue::~ReadQueue() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  queued_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  (void)cudaStreamSynchronize(stream_.get());  // a lost device has been reported already
}

uint64_t ReadQueue::add(char* to, const char* from, size_t bytes, const MappingReader* file) {
  const std::lock_guard lock(mutex_);
  for (size_t begin = 0; begin < bytes; begin += kSlotBytes) {
    pieces_.push_back({to + begin, from + begin, std::min(kSlotBytes, bytes - begin), file});
    done_.push_back(false);
  }
  queued_.notify_all();
  return num_done_ + done_.size();
}

void ReadQueue::wait(uint64_t pieces) {
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [&] { return failure_ != nullptr || num_done_ >= pieces; });
  if (failure_ != nullptr) std::rethrow_exception(failure_);
}

// A thread owns its slots, so that it waits for its own copies only.
void ReadQueue::work() {
  std::unique_ptr<PinnedBuffer> slots[kSlotsPerThread];
  Event copied[kSlotsPerThread];
  std::unique_lock lock(mutex_);
  for (int next = 0;; next = (next + 1) % kSlotsPerThread) {
    queued_.wait(lock, [this] { return ending_ || !pieces_.empty(); });
    if (ending_) return;
    const Piece piece = pieces_.front();
    pieces_.pop_front();
    const uint64_t index = num_begun_++;
    std::exception_ptr failure = failure_;
    lock.unlock();
    try {
      if (failure == nullptr) {
        if (!slots[next]) {
          cuda_check(cudaSetDevice(device_), "selecting the device");
          slots[next] = std::make_unique<PinnedBuffer>(kSlotBytes);
        }
        run(piece, *slots[next], copied[next]);
      }
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    if (failure != nullptr && failure_ == nullptr) failure_ = failure;
    done_[static_cast<size_t>(index - num_done_)] = true;
    while (!done_.empty() && done_.front()) {
      done_.pop_front();
      ++num_done_;
    }
    finished_.notify_all();
  }
}

void ReadQueue::run(const Piece& piece, PinnedBuffer& slot, Event& copied) {
  copied.wait();
  if (piece.file == nullptr) {
    std::memcpy(slot.data(), piece.from, piece.bytes);
  } else if (!piece.file->read(piece.from, piece.bytes, slot.data())) {
    throw file_changed_error("a weight");
  }
  cuda_check(
      cudaMemcpyAsync(piece.to, slot.data(), piece.bytes, cudaMemcpyHostToDevice, stream_.get()),
      "uploading weights");
  copied.record(stream_.get());
}

WeightUpload::WeightUpload(int device, DevicePool& pool, CudaStream stream)
    : pool_(pool), stream_(stream), large_(kLargeRegions), small_(kSmallRegions), queue_(device) {}

// Conversions that were not launched are dropped: the arrays they would read are incomplete. Those
// that were may still read the regions.
WeightUpload::~WeightUpload() { (void)cudaStreamSynchronize(stream_); }

void WeightUpload::begin(size_t bytes) {
  TM_CHECK(region_ == nullptr, "a group of %zu bytes inside another", bytes);
  const bool small = bytes <= kSmallBytes;
  Region& region = small ? small_[next_small_] : large_[next_large_];
  while (region.busy) complete_oldest();
  (small ? next_small_ : next_large_) =
      small ? (next_small_ + 1) % kSmallRegions : (next_large_ + 1) % kLargeRegions;
  if (!region.buffer || region.buffer->bytes() < bytes) {
    region.converted.wait();
    const size_t others = pool_.bytes_in_use() - device_bytes_;
    region.buffer.reset();
    device_bytes_ = pool_.bytes_in_use() - others;
    region.buffer = pool_.allocate(small ? kSmallBytes : bytes);
    device_bytes_ = pool_.bytes_in_use() - others;
    region.converted.record(stream_);  // behind whatever used this memory before
  }
  region.converted.make_wait(queue_.stream());
  region_ = &region;
  used_ = 0;
  read_now_ = false;
}

const void* WeightUpload::add(ConstTensorView source) {
  char* to = static_cast<char*>(region_->buffer->data()) + used_;
  const size_t bytes = source.bytes();
  used_ += round_up<size_t>(bytes, 256);
  TM_CHECK(used_ <= region_->buffer->bytes(), "a group of %zu bytes in a region of %zu", used_,
           region_->buffer->bytes());
  const MappingReader* file = file_of(source);
  last_piece_ = queue_.add(to, static_cast<const char*>(source.data), bytes, file);
  read_now_ = read_now_ || file == nullptr;
  return to;
}

void WeightUpload::end(std::function<void()> convert) {
  region_->busy = true;
  pending_.push_back({region_, last_piece_, std::move(convert)});
  region_ = nullptr;
  if (read_now_) queue_.wait(last_piece_);
}

void WeightUpload::complete_oldest() {
  queue_.wait(pending_.front().pieces);  // after a failure the group stays, and so does the failure
  const Group group = std::move(pending_.front());
  pending_.pop_front();
  copied_.record(queue_.stream());
  copied_.make_wait(stream_);
  group.convert();
  group.region->converted.record(stream_);
  group.region->busy = false;
}

void WeightUpload::finish() {
  while (!pending_.empty()) complete_oldest();
}

// Null: ordinary memory, or a file that cannot be opened again.
const MappingReader* WeightUpload::file_of(ConstTensorView source) {
  const auto known = [&]() -> const MappingReader* {
    for (const auto& [range, reader] : files_) {
      if (reader.is_open() && range.contains(source.data, source.bytes())) return &reader;
    }
    return nullptr;
  };
  if (const MappingReader* reader = known()) return reader;
  for (MappedRange& range : mapped_files()) {
    if (!range.contains(source.data, source.bytes())) continue;
    MappingReader reader(range);
    files_.emplace_back(std::move(range), std::move(reader));
  }
  return known();
}

}  // namespace turbomind::cuda
