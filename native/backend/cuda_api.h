// The C border of the CUDA library: what cuda_loader.cc looks up. C++ objects of backend.h cross it,
// so both sides must be built from the same headers: the ABI version says so. Exceptions never
// cross it: every call into the library runs inside `turbomind_cuda_guard`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turbomind {
class Backend;
}

namespace turbomind::cuda {

// Raise with every change of backend.h, weights.h, sampling.h, tensor_view.h or of this file.
inline constexpr int kAbiVersion = 8;

struct CreateOptions {
  int abi_version = kAbiVersion;
  int device = 0;
  int activation_dtype = 0;  // DType: bf16 or f16
  int use_graphs = 1;        // replay captured decode steps
};

// An error as plain bytes: code is -1 for none, else an ErrorCode.
struct CallStatus {
  int code = -1;
  char message[1024] = {};
};

using AbiVersionFn = int (*)();
using CreateFn = Backend* (*)(const CreateOptions*, CallStatus*);
using GuardFn = void (*)(void (*body)(void*), void* context, CallStatus*);
using RaiseFn = void (*)();  // throws inside the library, to end a forward that failed outside it
using QueryFn = int (*)(int index, char* text, size_t text_bytes);
// 0 if device `index` can run this library's kernels; else 1 and why not.
using ProbeFn = int (*)(int index, char* text, size_t text_bytes);

}  // namespace turbomind::cuda
