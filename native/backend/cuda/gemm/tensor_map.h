// Tensor maps for the bulk copy engine, made by the driver through an entry point asked at run time,
// so that the library links no driver library.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "base/types.h"

namespace turbomind::cuda {

// Row-major [rows, columns] of 2-byte elements with a row stride of `ld` elements (16-byte aligned);
// boxes of box_rows x box_columns (64: 128 bytes) in the 128-byte swizzle, zeros outside.
CUtensorMap make_tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns,
                            int64_t ld, int box_rows, int box_columns);
// The same matrix as [columns / 64][rows][64] (columns: a multiple of 64), boxes of box_blocks x
// box_rows x 64: one copy brings several blocks of 64 columns, one after the other.
CUtensorMap make_blocked_tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns,
                                    int64_t ld, int box_rows, int box_blocks);

}  // namespace turbomind::cuda
