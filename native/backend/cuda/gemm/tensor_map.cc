#include "backend/cuda/gemm/tensor_map.h"

#include "backend/cuda/cuda_check.h"

namespace turbomind::cuda {
namespace {

using EncodeFn = decltype(&cuTensorMapEncodeTiled);

EncodeFn find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                              cudaEnableDefault, &result),
             "looking up cuTensorMapEncodeTiled");
  if (function == nullptr || result != cudaDriverEntryPointSuccess) {
    throw Error(ErrorCode::unsupported_device,
                "the NVIDIA driver has no tensor maps; install a driver of CUDA 12 or newer");
  }
  return reinterpret_cast<EncodeFn>(function);
}

}  // namespace

CUtensorMap make_tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns,
                            int64_t ld, int box_rows, int box_columns) {
  static const EncodeFn encode = find_encode();  // a constant of the process
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = encode(
      &map,
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TM_CHECK(status == CUDA_SUCCESS,
           "cuTensorMapEncodeTiled: error %d for [%lld, %lld], stride %lld, box %d x %d",
           static_cast<int>(status), static_cast<long long>(rows), static_cast<long long>(columns),
           static_cast<long long>(ld), box_rows, box_columns);
  return map;
}

}  // namespace turbomind::cuda
