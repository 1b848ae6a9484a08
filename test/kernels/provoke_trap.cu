// See provoke.h.
#include <cuda_runtime.h>

#include "provoke.h"

namespace turbomind::cuda::testing {
namespace {
__global__ void trap_kernel() { __trap(); }
}  // namespace

void lose_the_device() {
  trap_kernel<<<1, 1>>>();
  (void)cudaDeviceSynchronize();
}

}  // namespace turbomind::cuda::testing
