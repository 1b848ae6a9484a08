#include "addon/host_info.h"

#include <dlfcn.h>

#include "addon/convert.h"
#include "addon/js_object.h"
#include "backend/cpu/isa.h"
#include "base/host_memory_info.h"

namespace turbomind::addon {
namespace {

struct CudaQuery {
  int device_count = 0;
  std::vector<std::string> devices;
  std::vector<std::string> problems;  // of each device: empty, or why it cannot be used
  std::string error;
};

// The library stays loaded: unloading a CUDA runtime is not safe.
CudaQuery ask_cuda(const std::string& path) {
  using QueryFn = int (*)(int idx, char* text, size_t text_bytes);  // cuda_api.h's, and ProbeFn
  CudaQuery query;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    query.error = reason != nullptr ? reason : "dlopen failed";
    return query;
  }
  const auto ask = reinterpret_cast<QueryFn>(dlsym(library, "turbomind_cuda_query"));
  if (ask == nullptr) {
    query.error = path + " is not a CUDA backend of this package: turbomind_cuda_query is missing";
    return query;
  }
  const auto probe = reinterpret_cast<QueryFn>(dlsym(library, "turbomind_cuda_probe"));
  if (probe == nullptr) {
    query.error = path + " is of another version: turbomind_cuda_probe is missing";
    return query;
  }
  char text[1024] = "";
  int count = ask(0, text, sizeof(text));
  if (count <= 0) {
    query.error = count < 0 ? text : "the driver works but sees no device";
    return query;
  }
  query.device_count = count;
  for (int i = 0; i < count; ++i) {
    text[0] = '\0';
    ask(i, text, sizeof(text));
    query.devices.emplace_back(text);
    text[0] = '\0';
    query.problems.emplace_back(probe(i, text, sizeof(text)) == 0 ? "" : text);
  }
  return query;
}

JsValue to_array(napi_env env, const std::vector<std::string>& texts) {
  JsArray array(env);
  for (const std::string& text : texts) array.push(text);
  return array.value();
}

}  // namespace

Napi::Value cpu_info(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guard(env, [&]() -> Napi::Value {
    const HostMemoryInfo memory = host_memory_info();
    JsObject object(env);
    object.set("isa", cpu::to_string(cpu::best_isa()));
    object.set("features", to_array(env, cpu::feature_names()));
    object.set("threads", cpu::usable_threads());
    object.set("totalMemoryBytes", static_cast<double>(memory.total_bytes));
    object.set("freeMemoryBytes", static_cast<double>(memory.free_bytes));
    return {env, object.value().get()};
  });
}

Napi::Value query_cuda(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guard(env, [&]() -> Napi::Value {
    const CudaQuery query = ask_cuda(Field(info[0], "queryCuda: libraryPath").string());
    JsObject object(env);
    object.set("deviceCount", query.device_count);
    object.set("devices", to_array(env, query.devices));
    object.set("problems", to_array(env, query.problems));
    object.set("error", query.error);
    return {env, object.value().get()};
  });
}

}  // namespace turbomind::addon
