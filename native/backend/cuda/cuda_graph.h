// Captured decode steps. A graph is found by what would be launched (a signature of the ops and
// their addresses) and by the padded sizes it was captured for, so that a changed buffer can only
// cost a new capture, never a wrong result. Engine thread.
#pragma once

#include <cstdint>
#include <functional>
#include <list>

#include "backend/cuda/cuda_check.h"

namespace turbomind::cuda {

inline constexpr int kMaxGraphRows = 256;  // tokens of a step that is captured

// Padded rows of a decode step: few enough graphs, little waste. More than kMaxGraphRows: as they are.
int row_bucket(int rows);
// Padded decode attention items.
int pad_items(int items);

struct GraphKey {
  uint64_t signature = 0;
  int rows = 0;         // padded tokens
  int items = 0;        // padded decode attention items
  int decode_rows = 0;  // most rows of a sequence, padded
  bool operator==(const GraphKey&) const = default;
};

class GraphCache {
 public:
  GraphCache() = default;
  ~GraphCache();
  GraphCache(const GraphCache&) = delete;
  GraphCache& operator=(const GraphCache&) = delete;

  // Replays the graph of `key`; captures it from `record` first if there is none. Drops the graph
  // used longest ago beyond kMaxGraphs.
  void run(const GraphKey& key, CudaStream stream, const std::function<void()>& record);
  void clear();
  size_t captures() const { return captures_; }

  static constexpr size_t kMaxGraphs = 96;
  // Bound of the device memory of a captured step: 64 layers of 8 kernels, under 2 kB each.
  static constexpr size_t kGraphBytes = size_t{1} << 20;

 private:
  struct Entry {
    GraphKey key;
    cudaGraphExec_t graph = nullptr;
  };
  std::list<Entry> entries_;  // most recently used first
  size_t captures_ = 0;
};

}  // namespace turbomind::cuda
