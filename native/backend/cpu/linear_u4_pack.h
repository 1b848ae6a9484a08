// AWQ arrays to packed blocks.
#pragma once

#include "backend/cpu/kernels/kernel_table.h"
#include "backend/cpu/mapped_memory.h"
#include "backend/cpu/thread_pool.h"
#include "backend/weights.h"

namespace turbomind::cpu {

// Checks shapes and types of all parts. Throws Error{tensor_mismatch | unsupported_quantization}.
void check_u4_source(const LinearSource& source);
U4Shape u4_shape(const LinearSource& source);
MappedMemory pack_u4(const LinearSource& source, const U4Shape& shape, ThreadPool& pool);

}  // namespace turbomind::cpu
