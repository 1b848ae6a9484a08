// Rows copied and gathered, embeddings, the unpacking of a step's arrays, and the conversions done
// once at load. Bound by launch latency or memory bandwidth.
#include <algorithm>

#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 256;

// Lets no dependent launch start early: see StepArrays.
__global__ void unpack_step_kernel(const UnpackArgs args) {
  grid_dependency_wait();
  const UnpackEntry& entry = args.entries[blockIdx.y];
  const bool fed = blockIdx.y == 0 && args.fed_from_word >= 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < entry.words; i += gridDim.x * kThreads) {
    const int32_t from = fed ? args.blob[args.fed_from_word + i] : -1;
    entry.destination[i] = from >= 0 ? args.ids[from] : args.blob[entry.source_word + i];
  }
}

// 2-byte elements; the type does not matter.
__global__ void copy_rows_kernel(const uint16_t* x, int64_t ldx, const int32_t* gather, uint16_t* y,
                                 int64_t ldy, int columns) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int64_t source = gather != nullptr ? gather[blockIdx.x] : blockIdx.x;
  for (int i = threadIdx.x; i < ldy; i += kThreads) {
    y[blockIdx.x * ldy + i] = i < columns ? x[source * ldx + i] : 0;
  }
}

__global__ void embed_kernel(const uint16_t* table, int64_t ld_table, int64_t vocab,
                             const int32_t* token_ids, uint16_t* x, int columns) {
  grid_dependency_wait();
  grid_dependency_launch();
  // An id outside the vocabulary is a caller's bug; row 0 keeps the read inside the table.
  const int64_t wanted = token_ids[blockIdx.x];
  const uint16_t* from = table + (wanted >= 0 && wanted < vocab ? wanted : 0) * ld_table;
  uint16_t* to = x + static_cast<int64_t>(blockIdx.x) * columns;
  const int wide = columns % 8 == 0 && ld_table % 8 == 0 ? columns / 8 : 0;
  for (int i = threadIdx.x; i < wide; i += blockDim.x) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  for (int i = wide * 8 + threadIdx.x; i < columns; i += blockDim.x) to[i] = from[i];
}

__device__ float load_as_float(const void* source, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(source)[i];
  if (type == DType::f16) return __half2float(static_cast<const __half*>(source)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(source)[i]);
}

__device__ int64_t mapped_row(int64_t row, RowMap map, int64_t base) {
  if (map == RowMap::plain) return base + row;
  return 16 * (row / 8) + row % 8 + (map == RowMap::up ? 8 : 0);
}

__global__ void convert_vector_kernel(const void* source, DType type, float* out, int64_t count,
                                      RowMap map, int64_t base) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[mapped_row(i, map, base)] = load_as_float(source, type, i);
}

template <class T>
__global__ void convert_matrix_kernel(const void* source, DType type, T* out, int64_t columns,
                                      int64_t ld, RowMap map, int64_t base) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < columns; i += kThreads) {
    out[mapped_row(row, map, base) * ld + i] =
        from_float<T>(load_as_float(source, type, row * columns + i));
  }
}

}  // namespace

void unpack_step(const LaunchContext& context, const UnpackArgs& args) {
  launch(unpack_step_kernel, {.grid = dim3(8, kUnpackEntries), .threads = kThreads}, context.stream,
         false, args);
}

void copy_rows(const LaunchContext& context, const void* x, int64_t ldx, const int32_t* gather,
               void* y, int64_t ldy, int rows, int columns) {
  if (rows == 0) return;
  launch(copy_rows_kernel, {.grid = dim3(static_cast<unsigned>(rows)), .threads = kThreads},
         context.stream, context.programmatic, static_cast<const uint16_t*>(x), ldx, gather,
         static_cast<uint16_t*>(y), ldy, columns);
}

void embed(const LaunchContext& context, const void* table, int64_t ld_table, int64_t vocab,
           const int32_t* token_ids, void* x, int rows, int columns) {
  if (rows == 0) return;
  // Eight columns a thread: a row of one decode step is one round trip to memory, not one a pass.
  const int threads = std::min(1024, round_up(ceil_div(columns, 8), 32));
  launch(embed_kernel, {.grid = dim3(static_cast<unsigned>(rows)), .threads = threads},
         context.stream, context.programmatic, static_cast<const uint16_t*>(table), ld_table, vocab,
         token_ids, static_cast<uint16_t*>(x), columns);
}

void convert_vector(const LaunchContext& context, const void* source, DType source_type, float* out,
                    int64_t count, RowMap map, int64_t base) {
  if (count == 0) return;
  launch(convert_vector_kernel,
         {.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(count, kThreads))),
          .threads = kThreads},
         context.stream, false, source, source_type, out, count, map, base);
}

void convert_matrix(const LaunchContext& context, const void* source, DType source_type, void* out,
                    DType out_type, int64_t rows, int64_t columns, int64_t ld, RowMap map,
                    int64_t base) {
  if (rows == 0) return;
  visit_dtype(out_type, [&]<class T>() {
    launch(convert_matrix_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(rows)), .threads = kThreads}, context.stream, false,
           source, source_type, static_cast<T*>(out), columns, ld, map, base);
  });
}

}  // namespace turbomind::cuda
