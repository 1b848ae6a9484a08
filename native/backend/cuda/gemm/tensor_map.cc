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

CUtensorMap encode_map(const void* data, DType dtype, int rank, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box) {
  static const EncodeFn encode = find_encode();  // a constant of the process
  CUtensorMap map;
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult status = encode(
      &map,
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TM_CHECK(status == CUDA_SUCCESS,
           "cuTensorMapEncodeTiled: error %d for [%lld, %lld], stride %lld bytes, box %u x %u",
           static_cast<int>(status), static_cast<long long>(sizes[1]),
           static_cast<long long>(sizes[0]), static_cast<long long>(strides[0]), box[1], box[0]);
  return map;
}

}  // namespace

CUtensorMap make_tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns,
                            int64_t ld, int box_rows, int box_columns) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  return encode_map(data, dtype, 2, sizes, strides, box);
}

CUtensorMap make_blocked_tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns,
                                    int64_t ld, int box_rows, int box_blocks) {
  const cuuint64_t sizes[3] = {64, static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(columns / 64)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(ld) * 2, 128};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(box_blocks)};
  return encode_map(data, dtype, 3, sizes, strides, box);
}

}  // namespace turbomind::cuda
