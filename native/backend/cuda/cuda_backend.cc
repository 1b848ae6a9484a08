// Opening a GPU, its memory, transfers and timers. Engine thread, or the thread that opens the pipeline.
#include "backend/cuda/cuda_backend.h"

#include "backend/cuda/host_buffer.h"

namespace turbomind::cuda {
namespace {

constexpr size_t kUploadHalfBytes = size_t{8} << 20;
constexpr int kLeastSm = 80;
constexpr size_t kDriverBytes = size_t{256} << 20;  // kernels loaded late, their local memory

// A buffer that the backend knows by address while it lives.
class TrackedBuffer final : public Buffer {
 public:
  using Registry = std::unordered_map<const void*, size_t>;
  TrackedBuffer(std::shared_ptr<Registry> registry, std::unique_ptr<Buffer> buffer)
      : registry_(std::move(registry)), buffer_(std::move(buffer)) {
    (*registry_)[buffer_->data()] = buffer_->bytes();
  }
  ~TrackedBuffer() override { registry_->erase(buffer_->data()); }
  void* data() override { return buffer_->data(); }
  size_t bytes() const override { return buffer_->bytes(); }

 private:
  std::shared_ptr<Registry> registry_;
  std::unique_ptr<Buffer> buffer_;
};

// Two events in the stream. An event that could not be recorded counts as no time: the device is
// lost then, and the next op says so.
class CudaOpTimer final : public OpTimer {
 public:
  explicit CudaOpTimer(CudaStream stream) : stream_(stream) {
    cuda_check(cudaEventCreate(&start_));
    cuda_check(cudaEventCreate(&stop_));
    cuda_check(cudaEventRecord(start_, stream_));
  }
  ~CudaOpTimer() override {
    (void)cudaEventDestroy(start_);
    (void)cudaEventDestroy(stop_);
  }
  CudaOpTimer(const CudaOpTimer&) = delete;
  CudaOpTimer& operator=(const CudaOpTimer&) = delete;
  void stop() override { stopped_ = cudaEventRecord(stop_, stream_) == cudaSuccess; }
  double ms() override {
    float ms = 0;
    if (!stopped_ || cudaEventSynchronize(stop_) != cudaSuccess ||
        cudaEventElapsedTime(&ms, start_, stop_) != cudaSuccess) {
      return 0;
    }
    return static_cast<double>(ms);
  }

 private:
  CudaStream stream_;
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
  bool stopped_ = false;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CreateOptions& options) {
  if (options.abi_version != kAbiVersion) {
    throw Error(ErrorCode::unsupported_device,
                format("the CUDA library speaks ABI %d, its caller %d; install matching versions",
                       kAbiVersion, options.abi_version));
  }
  return std::make_unique<CudaBackend>(options);
}

void check_supported(int device, const cudaDeviceProp& properties) {
  if (properties.major * 10 + properties.minor >= kLeastSm) return;
  throw Error(ErrorCode::unsupported_device,
              format("cuda:%d (%s) has compute capability %d.%d; 8.0 or newer is needed", device,
                     properties.name, properties.major, properties.minor));
}

CudaBackend::CudaBackend(const CreateOptions& options)
    : device_(options.device),
      dtype_(static_cast<DType>(options.activation_dtype)),
      use_graphs_(options.use_graphs != 0),
      live_buffers_(std::make_shared<std::unordered_map<const void*, size_t>>()) {
  if (options.activation_dtype == 0) dtype_ = DType::bf16;
  if (dtype_ != DType::bf16 && dtype_ != DType::f16) {
    throw Error(
        ErrorCode::invalid_argument,
        format("activations of %s on the GPU; expected bf16 or f16", to_string(dtype_).data()));
  }
  int count = 0;
  cuda_check(cudaGetDeviceCount(&count), "counting CUDA devices");
  if (device_ < 0 || device_ >= count) {
    throw Error(
        ErrorCode::unsupported_device,
        format("cuda:%d does not exist; this machine has %d CUDA device(s)", device_, count));
  }
  use_device();
  cuda_check(cudaGetDeviceProperties(&properties_, device_), "reading the device's properties");
  check_supported(device_, properties_);
  const int sm = properties_.major * 10 + properties_.minor;
  stream_ = std::make_unique<CudaStreamOwner>();
  context_ = {.stream = stream_->get(),
              .sm = sm,
              .num_sms = properties_.multiProcessorCount,
              .max_shared_bytes = static_cast<int>(properties_.sharedMemPerBlockOptin),
              .programmatic = properties_.major >= 9};
  staged_upload_ = std::make_unique<StagedUpload>(kUploadHalfBytes);
  // Fails here, with a sentence, where this build has no code for the device.
  zeroed(256);
  UnpackArgs nothing;
  unpack_step(context_, nothing);
  synchronize();
}

CudaBackend::~CudaBackend() {
  (void)cudaSetDevice(device_);
  (void)cudaStreamSynchronize(context_.stream);  // a lost device has been reported already
}

DeviceInfo CudaBackend::info() const {
  use_device();
  DeviceInfo info;
  info.name = properties_.name;
  int driver = 0;
  cuda_check(cudaDriverGetVersion(&driver), "reading the driver's version");
  info.description =
      format("sm_%d%d, %d SMs, CUDA driver %d.%d", properties_.major, properties_.minor,
             properties_.multiProcessorCount, driver / 1000, driver % 1000 / 10);
  cuda_check(cudaMemGetInfo(&info.free_bytes, &info.total_bytes), "reading free GPU memory");
  return info;
}

std::unique_ptr<Buffer> CudaBackend::allocate(size_t bytes) {
  use_device();
  return std::make_unique<TrackedBuffer>(live_buffers_, pool_.allocate(bytes));
}

std::unique_ptr<Buffer> CudaBackend::zeroed(size_t bytes) {
  std::unique_ptr<Buffer> buffer = pool_.allocate(bytes);
  cuda_check(cudaMemsetAsync(buffer->data(), 0, bytes, context_.stream), "clearing memory");
  return buffer;
}

void CudaBackend::upload(TensorView device, const void* host) {
  use_device();
  staged_upload_->copy(device.data, host, device.bytes(), context_.stream);
}

void CudaBackend::download(void* host, ConstTensorView device) {
  use_device();
  cuda_check(
      cudaMemcpyAsync(host, device.data, device.bytes(), cudaMemcpyDeviceToHost, context_.stream),
      "downloading");
  synchronize();
}

std::unique_ptr<Buffer> CudaBackend::allocate_host(size_t bytes) {
  use_device();
  return std::make_unique<HostBuffer>(bytes);
}

size_t CudaBackend::slack_bytes() const { return DevicePool::slab_bytes() + kDriverBytes; }

void CudaBackend::synchronize() {
  if (weight_upload_) weight_upload_->finish();
  cuda_check(cudaStreamSynchronize(context_.stream), "waiting for the GPU");
}

std::unique_ptr<OpTimer> CudaBackend::start_timer() {
  use_device();
  return std::make_unique<CudaOpTimer>(context_.stream);
}

CudaCounters CudaBackend::counters() const {
  return {pool_.driver_allocations(), graphs_.captures(), pool_.bytes_in_use(),
          workspace_.sampler ? workspace_.sampler->rows_on_host() : 0};
}

}  // namespace turbomind::cuda
