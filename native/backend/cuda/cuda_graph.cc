#include "backend/cuda/cuda_graph.h"

#include <bit>
#include <exception>

namespace turbomind::cuda {
namespace {

cudaGraphExec_t capture(CudaStream stream, const std::function<void()>& record) {
  cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
             "beginning a capture");
  cudaGraph_t graph = nullptr;
  try {
    record();
  } catch (const std::exception&) {
    (void)cudaStreamEndCapture(stream, &graph);  // the first error is the one to report
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    throw;
  }
  cuda_check(cudaStreamEndCapture(stream, &graph), "ending a capture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  (void)cudaGraphDestroy(graph);
  cuda_check(status, "instantiating a graph");
  return executable;
}

}  // namespace

int row_bucket(int rows) {
  constexpr int kBuckets[] = {1,  2,  4,  8,  12,  16,  24,  32,  40,  48,
                              56, 64, 80, 96, 112, 128, 160, 192, 224, 256};
  for (int bucket : kBuckets) {
    if (rows <= bucket) return bucket;
  }
  return rows;
}

int pad_items(int items) { return static_cast<int>(std::bit_ceil(static_cast<unsigned>(items))); }

GraphCache::~GraphCache() { clear(); }

void GraphCache::clear() {
  for (const Entry& entry : entries_) (void)cudaGraphExecDestroy(entry.graph);
  entries_.clear();
}

void GraphCache::run(const GraphKey& key, CudaStream stream, const std::function<void()>& record) {
  for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
    if (entry->key != key) continue;
    entries_.splice(entries_.begin(), entries_, entry);
    cuda_check(cudaGraphLaunch(entries_.front().graph, stream), "launching a graph");
    return;
  }
  const cudaGraphExec_t graph = capture(stream, record);
  entries_.push_front({key, graph});
  ++captures_;
  if (entries_.size() > kMaxGraphs) {
    (void)cudaGraphExecDestroy(entries_.back().graph);
    entries_.pop_back();
  }
  cuda_check(cudaGraphLaunch(graph, stream), "launching a graph");
}

}  // namespace turbomind::cuda
