// A launch whose CTAs along z form clusters; otherwise cuda_check.h's `launch`.
#pragma once

#include <utility>

#include "backend/cuda/cuda_check.h"

namespace turbomind::cuda {

// How many clusters of `depth` CTAs along z run at a time.
template <class... Parameters>
int count_clusters(void (*kernel)(Parameters...), int threads, int shared_bytes, unsigned depth) {
  cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "raising a kernel's shared memory");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {1, 1, depth};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1, 1, depth);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  cuda_check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "counting clusters");
  return clusters > 0 ? clusters : 1;
}

// `depth`: CTAs of a cluster, all along z; 1: no cluster.
template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), const LaunchShape& shape, unsigned depth,
                    CudaStream stream, bool programmatic, Arguments&&... arguments) {
  if (depth <= 1) {
    launch(kernel, shape, stream, programmatic, std::forward<Arguments>(arguments)...);
    return;
  }
  cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
      "raising a kernel's shared memory");
  // All of the SM's memory as shared memory: the driver's own choice may hold fewer CTAs.
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "choosing a kernel's shared memory carveout");
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {1, 1, depth};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = programmatic ? 2 : 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
             "launching a kernel");
}

}  // namespace turbomind::cuda
