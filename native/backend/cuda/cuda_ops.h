// What the files of ops share: views of their arguments as the kernels want them. Any thread.
#pragma once

#include <cmath>

#include "backend/backend.h"
#include "backend/cuda/cuda_linear.h"

namespace turbomind::cuda {

inline const CudaLinear& as_cuda(const LinearWeight* weight) {
  TM_CHECK(weight != nullptr, "an op without its weight");
  return static_cast<const CudaLinear&>(*weight);
}

inline int64_t row_bytes(ConstTensorView view) {
  return view.row_elements() * static_cast<int64_t>(dtype_bytes(view.dtype));
}

inline const float* floats(ConstTensorView view) { return static_cast<const float*>(view.data); }

inline float softmax_scale(float wanted, int head_dim) {
  return wanted != 0.0F ? wanted : 1.0F / std::sqrt(static_cast<float>(head_dim));
}

}  // namespace turbomind::cuda
