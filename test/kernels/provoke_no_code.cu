// See provoke.h. Compiled for one architecture that the test does not run on.
#include "backend/cuda/cuda_check.h"
#include "provoke.h"

namespace turbomind::cuda::testing {
namespace {
__global__ void empty_kernel(int* out) {
  if (out != nullptr) *out = 1;
}
}  // namespace

void launch_without_code() {
  launch(empty_kernel, {.grid = dim3(1), .threads = 1}, nullptr, false, nullptr);
}

}  // namespace turbomind::cuda::testing
