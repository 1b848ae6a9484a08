// A library for the driver to inject (CUDA_INJECTION64_PATH): writes when each kernel and copy of the
// process ran, one JSON line each, to $TM_TRACE_OUT.<pid>. Needs libcupti on the host, found at run time
// ($TM_CUPTI or the usual names); without it the process runs on untraced and says so. A tool of
// bench-gpu.mjs --kernels; the product does not know it.
#include <cupti.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <string>

namespace {

constexpr size_t kBufferBytes = size_t{8} << 20;

struct Cupti {
  decltype(&cuptiActivityEnable) enable;
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks;
  decltype(&cuptiActivityGetNextRecord) next_record;
  decltype(&cuptiActivityFlushAll) flush_all;
  decltype(&cuptiGetTimestamp) timestamp;
};
Cupti cupti;
std::FILE* out = nullptr;
std::mutex mutex;

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool load() {
  const char* named = std::getenv("TM_CUPTI");
  for (const char* name : {named, "libcupti.so", "libcupti.so.13", "libcupti.so.12",
                           "/usr/local/cuda/lib64/libcupti.so",
                           "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so"}) {
    void* library = name != nullptr ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (library == nullptr) continue;
    return find(library, "cuptiActivityEnable", cupti.enable) &&
           find(library, "cuptiActivityRegisterCallbacks", cupti.register_callbacks) &&
           find(library, "cuptiActivityGetNextRecord", cupti.next_record) &&
           find(library, "cuptiActivityFlushAll", cupti.flush_all) &&
           find(library, "cuptiGetTimestamp", cupti.timestamp);
  }
  return false;
}

void CUPTIAPI buffer_requested(uint8_t** buffer, size_t* bytes, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *bytes = *buffer != nullptr ? kBufferBytes : 0;
  *max_records = 0;
}

using Kernel = CUpti_ActivityKernel9;

void CUPTIAPI buffer_completed(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  const std::lock_guard lock(mutex);
  CUpti_Activity* record = nullptr;
  while (out != nullptr && cupti.next_record(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    const auto* kernel = reinterpret_cast<const Kernel*>(record);
    std::fprintf(out, "{\"n\":\"%s\",\"s\":%llu,\"e\":%llu,\"x\":%d,\"y\":%d,\"z\":%d,\"g\":%llu}\n",
                 kernel->name, static_cast<unsigned long long>(kernel->start),
                 static_cast<unsigned long long>(kernel->end), kernel->gridX, kernel->gridY,
                 kernel->gridZ, static_cast<unsigned long long>(kernel->graphNodeId));
  }
  std::free(buffer);
}

void finish() {
  if (cupti.flush_all != nullptr) (void)cupti.flush_all(1);
  const std::lock_guard lock(mutex);
  if (out != nullptr) std::fclose(out);
  out = nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  const char* path = std::getenv("TM_TRACE_OUT");
  if (path == nullptr) return 1;
  if (!load()) {
    std::fprintf(stderr, "step trace: libcupti was not found; set TM_CUPTI to its path\n");
    return 1;
  }
  out = std::fopen((std::string(path) + "." + std::to_string(getpid())).c_str(), "w");
  if (out == nullptr) return 1;
  // What Date.now() reads, at a timestamp of the records' clock.
  timespec now{};
  uint64_t timestamp = 0;
  (void)cupti.timestamp(&timestamp);
  clock_gettime(CLOCK_REALTIME, &now);
  std::fprintf(out, "{\"clock\":%llu,\"realtime\":%llu}\n", static_cast<unsigned long long>(timestamp),
               static_cast<unsigned long long>(now.tv_sec) * 1000000000ULL +
                   static_cast<unsigned long long>(now.tv_nsec));
  (void)cupti.register_callbacks(buffer_requested, buffer_completed);
  (void)cupti.enable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  std::atexit(finish);
  return 1;
}
