// Execution of a step: a decode step is signed (which ops, over which addresses), then replayed from the
// graph captured under that signature; any other runs op by op. Engine thread.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"

namespace turbomind::cuda {

void CudaBackend::execute(const std::function<void()>& forward) {
  use_device();
  if (!use_graphs_ || !step_.decode_only) {
    forward();
    return;
  }
  // Restores the plain mode whatever happens in forward.
  struct Restore {
    CudaBackend& backend;
    ~Restore() {
      backend.mode_ = Mode::run;
      backend.graph_rows_ = 0;
    }
  } restore{*this};
  signature_ = 0xcbf29ce484222325ULL;
  capacity_rows_ = kMaxGraphRows;
  capturable_ = true;
  mode_ = Mode::sign;
  forward();
  mode_ = Mode::run;
  if (!capturable_) {
    forward();
    return;
  }
  const int rows = step_.padded_rows <= capacity_rows_ ? step_.padded_rows : step_.tokens;
  const GraphKey key{signature_, rows, step_.padded_items, step_.decode_rows};
  graph_rows_ = rows;
  graphs_.run(key, context_.stream, forward);
}

int CudaBackend::launch_rows(int64_t rows) const {
  return graph_rows_ > 0 && rows == step_.tokens ? graph_rows_ : static_cast<int>(rows);
}

void CudaBackend::sign(std::initializer_list<uint64_t> values) {
  for (uint64_t value : values) {
    signature_ = (signature_ ^ value) * 0x9e3779b97f4a7c15ULL;
    signature_ ^= signature_ >> 29;
  }
}

void CudaBackend::sign_view(const void* data, int64_t row_bytes) {
  sign({address(data), static_cast<uint64_t>(row_bytes)});
  const auto known = live_buffers_->find(data);
  // A view that does not start a buffer holds the rows it says and no more.
  const int64_t rows = known == live_buffers_->end()
                           ? step_.tokens
                           : static_cast<int64_t>(known->second) / std::max<int64_t>(row_bytes, 1);
  capacity_rows_ = std::min(capacity_rows_, rows);
}

}  // namespace turbomind::cuda
