// What the addon knows about the machine: processor, memory, CUDA devices. JS thread; queryCuda is
// meant for a child process, because a broken driver may take the process down.
#pragma once

#include "addon/napi_support.h"

namespace turbomind::addon {

Napi::Value cpu_info(const Napi::CallbackInfo& info);
Napi::Value query_cuda(const Napi::CallbackInfo& info);

}  // namespace turbomind::addon
