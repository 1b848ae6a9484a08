// The library has its own C++ runtime, so an exception must not fly from it into ours. Each call
// goes through the library's guard, which catches on its side and hands back code and message;
// the proxy throws them again on ours. The forward of `execute` comes back the other way: what it
// throws is kept here and passed on after the library has returned.
#include "backend/cuda_loader.h"

#include <dlfcn.h>

#include <charconv>
#include <exception>
#include <utility>

#include "backend/cuda_api.h"

namespace turbomind {
namespace {

struct Library {
  cuda::CreateFn create = nullptr;
  cuda::GuardFn guard = nullptr;
  cuda::RaiseFn raise = nullptr;
  cuda::QueryFn query = nullptr;
};

[[noreturn]] void refuse(const std::string& path, const std::string& reason) {
  throw Error(ErrorCode::unsupported_device,
              format("the CUDA library '%s' cannot be used: %s", path.c_str(), reason.c_str()));
}

template <class Function>
Function find(void* handle, const std::string& path, const char* name) {
  void* symbol = dlsym(handle, name);
  if (symbol == nullptr) refuse(path, format("it does not export %s", name));
  return reinterpret_cast<Function>(symbol);
}

Library open_library(const std::string& path) {
  if (path.empty()) refuse(path, "no path was given; this installation has no CUDA backend");
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = dlerror();
    refuse(path, reason != nullptr ? reason : "dlopen failed");
  }
  const int version = find<cuda::AbiVersionFn>(handle, path, "turbomind_cuda_abi_version")();
  if (version != cuda::kAbiVersion) {
    refuse(path, format("it speaks ABI %d, this build %d; install matching versions", version,
                        cuda::kAbiVersion));
  }
  return {find<cuda::CreateFn>(handle, path, "turbomind_cuda_create"),
          find<cuda::GuardFn>(handle, path, "turbomind_cuda_guard"),
          find<cuda::RaiseFn>(handle, path, "turbomind_cuda_raise"),
          find<cuda::QueryFn>(handle, path, "turbomind_cuda_query")};
}

class CudaProxy final : public Backend {
 public:
  CudaProxy(const Library& library, Backend* backend) : library_(library), backend_(backend) {}

  DeviceInfo info() const override {
    return call([&] { return backend_->info(); });
  }
  DType activation_dtype() const override { return backend_->activation_dtype(); }
  int vision_rows_per_pass() const override { return backend_->vision_rows_per_pass(); }

  std::unique_ptr<Buffer> allocate(size_t bytes) override {
    return call([&] { return backend_->allocate(bytes); });
  }
  void upload(TensorView device, const void* host) override {
    call([&] { backend_->upload(device, host); });
  }
  void download(void* host, ConstTensorView device) override {
    call([&] { backend_->download(host, device); });
  }
  void synchronize() override {
    call([&] { backend_->synchronize(); });
  }

  std::unique_ptr<OpTimer> start_timer() override {
    return call([&] { return backend_->start_timer(); });
  }
  std::unique_ptr<Buffer> allocate_host(size_t bytes) override {
    return call([&] { return backend_->allocate_host(bytes); });
  }

  size_t buffer_bytes(size_t bytes) const override {
    return call([&] { return backend_->buffer_bytes(bytes); });
  }
  size_t weight_bytes(const LinearSource& source, WeightUse use) const override {
    return call([&] { return backend_->weight_bytes(source, use); });
  }
  size_t slack_bytes() const override {
    return call([&] { return backend_->slack_bytes(); });
  }
  size_t allocated_bytes() const override {
    return call([&] { return backend_->allocated_bytes(); });
  }

  std::unique_ptr<LinearWeight> load_linear(const LinearSource& source) override {
    return call([&] { return backend_->load_linear(source); });
  }
  std::unique_ptr<LinearWeight> load_embedding(ConstTensorView table) override {
    return call([&] { return backend_->load_embedding(table); });
  }
  std::unique_ptr<LinearWeight> load_head(const LinearSource& source) override {
    return call([&] { return backend_->load_head(source); });
  }
  std::unique_ptr<Buffer> load_vector(ConstTensorView source) override {
    return call([&] { return backend_->load_vector(source); });
  }

  size_t kv_block_bytes(const KvCacheSpec& spec) const override {
    return call([&] { return backend_->kv_block_bytes(spec); });
  }
  std::unique_ptr<KvCache> make_kv_cache(const KvCacheSpec& spec) override {
    return call([&] { return backend_->make_kv_cache(spec); });
  }
  void copy_blocks(KvCache& cache, std::span<const std::pair<BlockId, BlockId>> from_to) override {
    call([&] { backend_->copy_blocks(cache, from_to); });
  }
  void save_blocks(const KvCache& cache, std::span<const BlockId> blocks, void* host) override {
    call([&] { backend_->save_blocks(cache, blocks, host); });
  }
  void load_blocks(KvCache& cache, std::span<const BlockId> blocks, const void* host) override {
    call([&] { backend_->load_blocks(cache, blocks, host); });
  }
  WorkspaceBytes workspace_bytes(const WorkspaceSpec& spec) const override {
    return call([&] { return backend_->workspace_bytes(spec); });
  }
  WorkspaceBytes reserve_workspace(const WorkspaceSpec& spec) override {
    return call([&] { return backend_->reserve_workspace(spec); });
  }

  void begin_step(const StepBatch& batch) override {
    call([&] { backend_->begin_step(batch); });
  }
  void execute(const std::function<void()>& forward) override {
    std::exception_ptr thrown;
    const std::function<void()> kept = [&] {
      try {
        forward();
      } catch (...) {  // any exception: it continues once the library has cleaned up
        thrown = std::current_exception();
      }
      if (thrown) library_.raise();  // ends the library's capture or step on its own terms
    };
    try {
      call([&] { backend_->execute(kept); });
    } catch (const Error&) {
      if (!thrown) throw;
    }
    if (thrown) std::rethrow_exception(thrown);
  }

  void embed(const EmbedArgs& args) override {
    call([&] { backend_->embed(args); });
  }
  void norm(const Norm& norm, ConstTensorView x, TensorView y) override {
    call([&] { backend_->norm(norm, x, y); });
  }
  void linear(const LinearArgs& args) override {
    call([&] { backend_->linear(args); });
  }
  void attention(const AttentionArgs& args) override {
    call([&] { backend_->attention(args); });
  }
  void start_sample(const SampleArgs& args) override {
    call([&] { backend_->start_sample(args); });
  }
  void sample(const SampleArgs& args) override {
    call([&] { backend_->sample(args); });
  }
  bool launch_sample(const SampleArgs& args) override {
    return call([&] { return backend_->launch_sample(args); });
  }
  void collect_sample(std::span<SampleResult> results) override {
    call([&] { backend_->collect_sample(results); });
  }
  void logits(const LogitsArgs& args, std::span<float> out) override {
    call([&] { backend_->logits(args, out); });
  }
  void patchify(const PatchifyArgs& args) override {
    call([&] { backend_->patchify(args); });
  }
  void vision_embed(const VisionEmbedArgs& args) override {
    call([&] { backend_->vision_embed(args); });
  }
  void vision_attention(const VisionAttentionArgs& args) override {
    call([&] { backend_->vision_attention(args); });
  }
  void pixel_shuffle(const PixelShuffleArgs& args) override {
    call([&] { backend_->pixel_shuffle(args); });
  }

 private:
  // Runs `body`, whose only work is one call into the library, inside the library's guard. The
  // frames an exception passes on its way there own nothing.
  template <class Body>
  auto call(Body&& body) const -> decltype(body()) {
    using Result = decltype(body());
    cuda::CallStatus status;
    if constexpr (std::is_void_v<Result>) {
      library_.guard(
          [](void* context) { (*static_cast<std::remove_reference_t<Body>*>(context))(); }, &body,
          &status);
      throw_if_failed(status);
    } else {
      struct Frame {
        std::remove_reference_t<Body>* body;
        Result result;
      } frame{&body, {}};
      library_.guard(
          [](void* context) {
            auto* inner = static_cast<Frame*>(context);
            inner->result = (*inner->body)();
          },
          &frame, &status);
      throw_if_failed(status);
      return std::move(frame.result);
    }
  }
  static void throw_if_failed(const cuda::CallStatus& status) {
    if (status.code >= 0) throw Error(static_cast<ErrorCode>(status.code), status.message);
  }

  Library library_;
  std::unique_ptr<Backend> backend_;
};

}  // namespace

std::unique_ptr<Backend> load_cuda_backend(const CudaLoadOptions& options) {
  const Library library = open_library(options.library);
  const cuda::CreateOptions create{.abi_version = cuda::kAbiVersion,
                                   .device = options.device,
                                   .activation_dtype = static_cast<int>(options.activations),
                                   .use_graphs = options.use_graphs ? 1 : 0};
  cuda::CallStatus status;
  Backend* backend = library.create(&create, &status);
  if (backend == nullptr) {
    throw Error(
        status.code >= 0 ? static_cast<ErrorCode>(status.code) : ErrorCode::unsupported_device,
        status.message);
  }
  return std::make_unique<CudaProxy>(library, backend);
}

int parse_cuda_device(const std::string& device) {
  if (device == "cuda") return 0;
  int index = -1;
  if (device.rfind("cuda:", 0) == 0) {
    const char* begin = device.data() + 5;
    const char* end = device.data() + device.size();
    const auto parsed = std::from_chars(begin, end, index);
    if (parsed.ec != std::errc{} || parsed.ptr != end) index = -1;
  }
  if (index < 0) {
    throw Error(ErrorCode::unsupported_device,
                format("device '%s' is unknown; expected 'cuda' or 'cuda:N'", device.c_str()));
  }
  return index;
}

CudaQuery query_cuda(const std::string& library, int index) {
  try {
    char text[256] = {};
    const int count = open_library(library).query(index, text, sizeof text);
    return {count > 0 ? count : 0, text};
  } catch (const Error& error) {
    return {0, error.what()};
  }
}

}  // namespace turbomind
