// Loading's way to the device. Threads read pieces of the checkpoint's files into pinned slots, from
// which a stream of its own copies them to raw arrays on the device; conversions of whole groups of
// arrays follow in the backend's stream. All three overlap: the caller runs ahead of the data by a few
// groups. Files are read through their descriptors: page faults of a mapping hold a thread to a few
// GB/s, and many reads at a time are what a disk wants. One owner: the thread that loads.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "backend/cuda/cuda_memory.h"
#include "base/file_mapping.h"
#include "base/tensor_view.h"

namespace turbomind::cuda {

// The threads and their slots.
class ReadQueue {
 public:
  static constexpr size_t kSlotBytes = size_t{2} << 20;

  explicit ReadQueue(int device);
  ~ReadQueue();  // what is queued and not begun is dropped
  ReadQueue(const ReadQueue&) = delete;
  ReadQueue& operator=(const ReadQueue&) = delete;

  // Queues the copy of [from, from + bytes) to the device: read from `file`, or if null from memory.
  // Answers how many pieces have been queued in all; see wait().
  uint64_t add(char* to, const char* from, size_t bytes, const MappingReader* file);
  // Until the first `pieces` have been read and their copies are in the stream. Throws what failed.
  void wait(uint64_t pieces);
  CudaStream stream() const { return stream_.get(); }

 private:
  struct Piece {
    char* to = nullptr;
    const char* from = nullptr;
    size_t bytes = 0;
    const MappingReader* file = nullptr;
  };
  void work();
  void run(const Piece& piece, PinnedBuffer& slot, Event& copied);

  int device_;
  CudaStreamOwner stream_;
  std::mutex mutex_;
  std::condition_variable queued_;
  std::condition_variable finished_;
  std::deque<Piece> pieces_;    // not begun
  std::deque<bool> done_;       // of the pieces from num_done_ on
  uint64_t num_begun_ = 0;      // pieces
  uint64_t num_done_ = 0;       // pieces without a gap
  std::exception_ptr failure_;  // the first
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

class WeightUpload {
 public:
  WeightUpload(int device, DevicePool& pool, CudaStream stream);
  ~WeightUpload();
  WeightUpload(const WeightUpload&) = delete;
  WeightUpload& operator=(const WeightUpload&) = delete;

  // A group: begin, an add for each array, end. `bytes` is enough for all arrays, each rounded up to
  // 256. Waits for an earlier group while too many are under way.
  void begin(size_t bytes);
  // Where the array will lie on the device. A mapped file is read later, by the time finish() has
  // returned; other memory before end() returns.
  const void* add(ConstTensorView source);
  // `convert` launches what reads the arrays, once they are on their way.
  void end(std::function<void()> convert);
  // Everything is read and launched; the device may still be at it. Throws if a source could not be
  // read.
  void finish();
  size_t device_bytes() const { return device_bytes_; }  // of the pool, for as long as this lives

 private:
  // Device memory of one group at a time.
  struct Region {
    std::unique_ptr<Buffer> buffer;
    Event converted;
    bool busy = false;  // its group is in pending_
  };
  struct Group {
    Region* region = nullptr;
    uint64_t pieces = 0;  // of the queue, up to its last one
    std::function<void()> convert;
  };
  void complete_oldest();
  const MappingReader* file_of(ConstTensorView source);

  DevicePool& pool_;
  CudaStream stream_;
  Event copied_;
  std::vector<Region> large_;
  std::vector<Region> small_;
  size_t device_bytes_ = 0;  // of all regions
  size_t next_large_ = 0;
  size_t next_small_ = 0;
  std::deque<Group> pending_;
  Region* region_ = nullptr;  // between begin and end
  size_t used_ = 0;           // of it
  uint64_t last_piece_ = 0;
  bool read_now_ = false;  // a source may be gone after end()
  std::deque<std::pair<MappedRange, MappingReader>> files_;
  ReadQueue queue_;  // last: its threads use the files and write to the regions
};

}  // namespace turbomind::cuda
