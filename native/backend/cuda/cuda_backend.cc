#include "backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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

const CudaLinear& as_cuda(const LinearWeight* weight) {
  TM_CHECK(weight != nullptr, "an op without its weight");
  return static_cast<const CudaLinear&>(*weight);
}

int64_t row_bytes(ConstTensorView view) {
  return view.row_elements() * static_cast<int64_t>(dtype_bytes(view.dtype));
}

const float* floats(ConstTensorView view) { return static_cast<const float*>(view.data); }

float softmax_scale(float wanted, int head_dim) {
  return wanted != 0.0F ? wanted : 1.0F / std::sqrt(static_cast<float>(head_dim));
}

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

// ---- KV cache ------------------------------------------------------------------------------------

size_t CudaBackend::kv_block_bytes(const KvCacheSpec& spec) const {
  return static_cast<size_t>(spec.num_layers) * 2 * static_cast<size_t>(spec.num_kv_heads) *
         kv_tile_bytes(spec.head_dim, spec.bits);
}

std::unique_ptr<KvCache> CudaBackend::make_kv_cache(const KvCacheSpec& spec) {
  if (spec.block_size != kBlockTokens) {
    throw Error(ErrorCode::invalid_argument,
                format("KV blocks of %d tokens on the GPU; its kernels read blocks of %d",
                       spec.block_size, kBlockTokens));
  }
  return std::make_unique<CudaKvCache>(
      spec, allocate(kv_block_bytes(spec) * static_cast<size_t>(spec.num_blocks)));
}

void* CudaKvCache::layer(int layer) const {
  const size_t bytes = buffer_->bytes() / static_cast<size_t>(spec_.num_layers);
  return static_cast<char*>(buffer_->data()) + static_cast<size_t>(layer) * bytes;
}

char* CudaKvCache::block(BlockId block) const {
  TM_CHECK(block >= 0 && block < spec_.num_blocks, "KV block %d of %d", block, spec_.num_blocks);
  return static_cast<char*>(buffer_->data()) + static_cast<size_t>(block) * piece_bytes();
}

size_t CudaKvCache::piece_bytes() const {
  return piece_pitch() / static_cast<size_t>(spec_.num_blocks);
}

size_t CudaKvCache::piece_pitch() const {
  return buffer_->bytes() / static_cast<size_t>(spec_.num_layers);
}

void CudaBackend::copy_pieces(const CudaKvCache& cache, char* to, size_t to_pitch, const char* from,
                              size_t from_pitch, cudaMemcpyKind kind) {
  const size_t bytes = cache.piece_bytes();
  const auto pieces = static_cast<size_t>(cache.spec().num_layers);
  if (std::max(to_pitch, from_pitch) <= properties_.memPitch) {
    cuda_check(
        cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, pieces, kind, context_.stream),
        "copying a KV block");
    return;
  }
  for (size_t i = 0; i < pieces; ++i) {
    cuda_check(
        cudaMemcpyAsync(to + i * to_pitch, from + i * from_pitch, bytes, kind, context_.stream),
        "copying a KV block");
  }
}

void CudaBackend::copy_blocks(KvCache& cache,
                              std::span<const std::pair<BlockId, BlockId>> from_to) {
  use_device();
  const auto& kv = static_cast<const CudaKvCache&>(cache);
  for (const auto& [from, to] : from_to) {
    TM_CHECK(from != to, "KV block %d copied over itself", from);
    copy_pieces(kv, kv.block(to), kv.piece_pitch(), kv.block(from), kv.piece_pitch(),
                cudaMemcpyDeviceToDevice);
  }
}

void CudaBackend::save_blocks(const KvCache& cache, std::span<const BlockId> blocks, void* host) {
  use_device();
  const auto& kv = static_cast<const CudaKvCache&>(cache);
  auto* to = static_cast<char*>(host);
  for (BlockId block : blocks) {
    copy_pieces(kv, to, kv.piece_bytes(), kv.block(block), kv.piece_pitch(),
                cudaMemcpyDeviceToHost);
    to += kv_block_bytes(kv.spec());
  }
}

void CudaBackend::load_blocks(KvCache& cache, std::span<const BlockId> blocks, const void* host) {
  use_device();
  const auto& kv = static_cast<const CudaKvCache&>(cache);
  const auto* from = static_cast<const char*>(host);
  for (BlockId block : blocks) {
    copy_pieces(kv, kv.block(block), kv.piece_pitch(), from, kv.piece_bytes(),
                cudaMemcpyHostToDevice);
    from += kv_block_bytes(kv.spec());
  }
}

// ---- language model ops --------------------------------------------------------------------------

void CudaBackend::embed(const EmbedArgs& args) {
  const CudaLinear& table = as_cuda(args.table);
  if (mode_ == Mode::sign) {
    sign({1, address(args.table)});
    sign_view(args.x.data, row_bytes(args.x));
    capturable_ = capturable_ && args.overrides.empty();
    return;
  }
  split_norms_.forget(args.x.data);
  cuda::embed(context_, table.matrix.weights, table.matrix.k_padded, table.matrix.n,
              workspace_.step.token_ids, args.x.data, launch_rows(args.x.dim(0)),
              static_cast<int>(args.x.dim(1)));
  for (const EmbeddingOverride& image : args.overrides) {
    const TensorView rows = args.x.rows(image.row, image.embeddings.dim(0));
    cuda_check(cudaMemcpyAsync(rows.data, image.embeddings.data, rows.bytes(),
                               cudaMemcpyDeviceToDevice, context_.stream),
               "placing image embeddings");
  }
}

void CudaBackend::norm(const Norm& norm, ConstTensorView x, TensorView y) {
  if (mode_ == Mode::sign) {
    sign({2, address(norm.weight.data)});
    sign_view(x.data, row_bytes(x));
    sign_view(y.data, row_bytes(y));
    return;
  }
  split_norms_.forget(y.data);
  const int64_t columns = x.row_elements();
  cuda::norm(context_, dtype_,
             {.kind = norm.kind,
              .weight = floats(norm.weight),
              .bias = floats(norm.bias),
              .eps = norm.eps,
              .x = x.data,
              .y = y.data,
              .ldx = columns,
              .ldy = columns,
              .rows = launch_rows(x.dim(0)),
              .columns = static_cast<int>(columns)});
}

const void* CudaBackend::padded_input(const CudaLinear& weight, const void* x, int rows,
                                      int64_t* ldx) {
  *ldx = weight.matrix.k;
  if (weight.matrix.k % 8 == 0) return x;
  // Rows that 16-byte copies cannot reach (a patch of 3 * 14 * 14 values): copied to aligned ones.
  split_norms_.forget();
  *ldx = weight.matrix.k_padded;
  TM_CHECK(static_cast<size_t>(rows) * static_cast<size_t>(*ldx) * 2 <= workspace_.scratch->bytes(),
           "%d rows of %lld exceed the workspace", rows, static_cast<long long>(*ldx));
  copy_rows(context_, x, weight.matrix.k, nullptr, workspace_.scratch->data(), *ldx, rows,
            static_cast<int>(weight.matrix.k));
  return workspace_.scratch->data();
}

void CudaBackend::run_gemm(const CudaLinear& weight, GemmArgs args) {
  if (args.m == 0) return;
  args.w = &weight.matrix;
  args.partials = static_cast<float*>(workspace_.gemm_partials->data());
  args.partial_floats = workspace_.gemm_partials->bytes() / sizeof(float);
  args.tickets = static_cast<uint32_t*>(workspace_.gemm_tickets->data());
  args.num_tickets = workspace_.gemm_tickets->bytes() / sizeof(uint32_t);
  const bool forced =
      std::any_of(gemm_table().begin(), gemm_table().end(), [&](const GemmKernel& row) {
        return row.name == forced_gemm_ && context_.sm >= row.min_sm && context_.sm <= row.max_sm &&
               row.supports(args, context_);
      });
  select_gemm(args, context_, forced ? forced_gemm_ : std::string_view{}).run(args, context_);
}

void CudaBackend::linear(const LinearArgs& args) {
  const CudaLinear& weight = as_cuda(args.weight);
  if (mode_ == Mode::sign) {
    sign({3, address(args.weight), args.norm != nullptr ? address(args.norm->weight.data) : 0,
          static_cast<uint64_t>(args.epilogue), address(args.scale.data),
          args.next_norm != nullptr ? address(args.next_norm->weight.data) : 0});
    sign_view(args.x.data, row_bytes(args.x));
    sign_view(args.y.data, row_bytes(args.y));
    return;
  }
  const int64_t k = weight.matrix.k;
  TM_CHECK(workspace_.scratch != nullptr, "linear before reserve_workspace");
  TM_CHECK(args.x.row_elements() == k && args.y.dim(0) == args.x.dim(0) &&
               args.y.row_elements() ==
                   (args.epilogue == Epilogue::silu_mul ? weight.matrix.n / 2 : weight.matrix.n) &&
               (args.epilogue == Epilogue::silu_mul) == weight.matrix.gate_up,
           "linear: x [%lld, %lld], y [%lld, %lld], W [%lld, %lld]",
           static_cast<long long>(args.x.dim(0)), static_cast<long long>(args.x.row_elements()),
           static_cast<long long>(args.y.dim(0)), static_cast<long long>(args.y.row_elements()),
           static_cast<long long>(weight.matrix.n), static_cast<long long>(k));
  const int rows = launch_rows(args.x.dim(0));
  const void* x = args.x.data;
  void* scratch = workspace_.scratch->data();
  int64_t ldx = k;
  InputNorm input_norm;
  if (args.norm != nullptr && split_norms_.has(x, args.x.dim(0), *args.norm)) {
    input_norm = split_norms_.input(context_, k, rows);
    x = scratch;
  } else if (args.norm != nullptr) {
    split_norms_.forget();
    const int64_t padded = round_up<int64_t>(k, 8);
    TM_CHECK(k % 8 == 0 && static_cast<size_t>(rows) * static_cast<size_t>(padded) * 2 <=
                               workspace_.scratch->bytes(),
             "a norm over %lld columns and %d rows", static_cast<long long>(k), rows);
    cuda::norm(context_, dtype_,
               {.kind = args.norm->kind,
                .weight = floats(args.norm->weight),
                .bias = floats(args.norm->bias),
                .eps = args.norm->eps,
                .x = x,
                .y = scratch,
                .ldx = k,
                .ldy = k,
                .rows = rows,
                .columns = static_cast<int>(k)});
    x = scratch;
  } else {
    x = padded_input(weight, x, rows, &ldx);
  }
  // z goes to scratch, unless this product reads from there.
  NextNorm next_norm;
  if (args.next_norm != nullptr && args.epilogue == Epilogue::residual && x != scratch) {
    const int64_t columns = weight.matrix.n;
    next_norm = split_norms_.next(*args.next_norm, columns, scratch);
    TM_CHECK(next_norm.weight == nullptr ||
                 static_cast<size_t>(rows * columns) * 2 <= workspace_.scratch->bytes(),
             "a norm over %lld columns and %d rows", static_cast<long long>(columns), rows);
  }
  run_gemm(weight, {.x = x,
                    .ldx = ldx,
                    .m = rows,
                    .y = args.y.data,
                    .ldy = args.y.row_elements(),
                    .epilogue = args.epilogue,
                    .scale = floats(args.scale),
                    .input_norm = input_norm,
                    .next_norm = next_norm});
  split_norms_.forget(args.y.data);
  if (next_norm.weight != nullptr) {
    split_norms_.left(args.y.data, args.y.dim(0), *args.next_norm, next_norm);
  }
}

void CudaBackend::attention(const AttentionArgs& args) {
  const auto& cache = static_cast<const CudaKvCache&>(*args.cache);
  if (mode_ == Mode::sign) {
    sign({4, address(args.cache), static_cast<uint64_t>(args.layer),
          args.q_norm != nullptr ? address(args.q_norm->weight.data) : 0,
          args.k_norm != nullptr ? address(args.k_norm->weight.data) : 0,
          address(args.rope.inv_freq.data)});
    sign_view(args.qkv.data, row_bytes(args.qkv));
    sign_view(args.y.data, row_bytes(args.y));
    return;
  }
  Workspace& w = workspace_;
  TM_CHECK(args.num_heads <= w.spec.max_heads && args.head_dim <= w.spec.max_head_dim &&
               args.num_heads % args.num_kv_heads == 0,
           "attention with %d heads of %d; the workspace was made for %d of %d", args.num_heads,
           args.head_dim, w.spec.max_heads, w.spec.max_head_dim);
  void* layer = cache.layer(args.layer);
  const int bits = cache.spec().bits;
  const float scale = softmax_scale(args.softmax_scale, args.head_dim);
  const RopeArgs rope{.inv_freq = floats(args.rope.inv_freq),
                      .attention_scaling = args.rope.attention_scaling,
                      .q_norm = args.q_norm != nullptr ? floats(args.q_norm->weight) : nullptr,
                      .k_norm = args.k_norm != nullptr ? floats(args.k_norm->weight) : nullptr,
                      .q_norm_eps = args.q_norm != nullptr ? args.q_norm->eps : 0.0F,
                      .k_norm_eps = args.k_norm != nullptr ? args.k_norm->eps : 0.0F};
  const bool fused = step_.tiles == 0;  // the decode kernel takes every row
  if (!fused) {
    rope_kv(context_, dtype_,
            {.qkv = args.qkv.data,
             .cache = layer,
             .kv_bits = bits,
             .rope = rope,
             .positions = w.step.positions,
             .slots = w.step.slots,
             .tokens = launch_rows(args.qkv.dim(0)),
             .num_heads = args.num_heads,
             .num_kv_heads = args.num_kv_heads,
             .head_dim = args.head_dim});
  }
  decode_attention(context_, dtype_,
                   {.qkv = args.qkv.data,
                    .y = args.y.data,
                    .cache = layer,
                    .kv_bits = bits,
                    .rope = fused ? rope : RopeArgs{},
                    .step = w.step,
                    .num_items = graph_rows_ > 0 ? step_.padded_items : step_.items,
                    .max_rows = std::max(step_.decode_rows, 1),
                    .partial_out = static_cast<float*>(w.attention_out->data()),
                    .partial_max_sum = static_cast<float2*>(w.attention_max_sum->data()),
                    .tickets = static_cast<uint32_t*>(w.attention_tickets->data()),
                    .records = static_cast<uint32_t*>(w.attention_records->data()),
                    .num_heads = args.num_heads,
                    .num_kv_heads = args.num_kv_heads,
                    .head_dim = args.head_dim,
                    .softmax_scale = scale});
  prefill_attention(context_, dtype_,
                    {.qkv = args.qkv.data,
                     .y = args.y.data,
                     .cache = layer,
                     .kv_bits = bits,
                     .step = w.step,
                     .tokens = static_cast<int>(args.qkv.dim(0)),
                     .num_tiles = step_.tiles,
                     .num_heads = args.num_heads,
                     .num_kv_heads = args.num_kv_heads,
                     .head_dim = args.head_dim,
                     .softmax_scale = scale});
}

// ---- sampling ------------------------------------------------------------------------------------

void CudaBackend::compute_logits(const LogitsArgs& args, const int32_t* gather, int rows) {
  use_device();
  const CudaLinear& head = as_cuda(args.head);
  Workspace& w = workspace_;
  TM_CHECK(w.sampler != nullptr && head.matrix.n <= w.spec.vocab_size,
           "a head of %lld rows; the workspace was made for %lld",
           static_cast<long long>(head.matrix.n), static_cast<long long>(w.spec.vocab_size));
  const int64_t hidden = args.x.row_elements();
  TM_CHECK(hidden == head.matrix.k && hidden % 8 == 0, "a head over %lld columns of %lld",
           static_cast<long long>(head.matrix.k), static_cast<long long>(hidden));
  split_norms_.forget();
  void* x = w.scratch->data();
  if (args.norm != nullptr) {
    cuda::norm(context_, dtype_,
               {.kind = args.norm->kind,
                .weight = floats(args.norm->weight),
                .bias = floats(args.norm->bias),
                .eps = args.norm->eps,
                .x = args.x.data,
                .y = x,
                .ldx = hidden,
                .ldy = hidden,
                .gather = gather,
                .rows = rows,
                .columns = static_cast<int>(hidden)});
  } else {
    copy_rows(context_, args.x.data, hidden, gather, x, hidden, rows, static_cast<int>(hidden));
  }
  run_gemm(head, {.x = x,
                  .ldx = hidden,
                  .m = rows,
                  .y = w.sampler->logits(),
                  .ldy = head.matrix.n,
                  .y_is_f32 = true});
}

void CudaBackend::launch_head(const SampleArgs& args, int rows) {
  compute_logits({.head = args.head, .norm = args.norm, .x = args.x}, workspace_.step.sample_rows,
                 rows);
  workspace_.sampler->scan(context_, rows, as_cuda(args.head).matrix.n, sampled_step());
}

SampledStep CudaBackend::sampled_step() const {
  const StepArrays& step = workspace_.step;
  return {.slot = step_.slot,
          .device_slot = step.block_stride + 2,
          .token_ids = step.token_ids,
          .fed_rows = workspace_.fed_rows};
}

void CudaBackend::start_sample(const SampleArgs& args) {
  TM_CHECK(workspace_.sampler != nullptr, "sampling before reserve_workspace");
  step_.started_head = args.head;
  if (mode_ == Mode::sign) {
    sign({5, address(args.head), args.norm != nullptr ? address(args.norm->weight.data) : 0});
    sign_view(args.x.data, row_bytes(args.x));
    capacity_rows_ = std::min<int64_t>(capacity_rows_, workspace_.sampler->sizes().rows);
    return;
  }
  // Padding rows of a captured step repeat row 0.
  launch_head(args, graph_rows_ > 0 ? graph_rows_ : step_.rows);
}

SampledStep CudaBackend::ready_to_sample(const SampleArgs& args) {
  TM_CHECK(static_cast<int>(args.rows.size()) == step_.rows && workspace_.sampler != nullptr,
           "%zu sample rows for a step that wants %d", args.rows.size(), step_.rows);
  use_device();
  if (step_.started_head != args.head) launch_head(args, step_.rows);
  step_.started_head = args.head;
  return sampled_step();
}

void CudaBackend::sample(const SampleArgs& args) {
  TM_CHECK(args.results.size() == args.rows.size(), "%zu results for %zu rows", args.results.size(),
           args.rows.size());
  if (args.rows.empty()) return;
  const SampledStep step = ready_to_sample(args);
  workspace_.sampler->sample(context_, as_cuda(args.head).matrix.n, args.rows, args.results, step);
}

bool CudaBackend::launch_sample(const SampleArgs& args) {
  if (args.rows.empty()) return false;
  const SampledStep step = ready_to_sample(args);
  return workspace_.sampler->launch(context_, as_cuda(args.head).matrix.n, args.rows, step);
}

void CudaBackend::collect_sample(std::span<SampleResult> results) {
  use_device();
  workspace_.sampler->collect(results);
}

void CudaBackend::logits(const LogitsArgs& args, std::span<float> out) {
  const int64_t rows = args.x.dim(0);
  const int64_t vocab = as_cuda(args.head).matrix.n;
  TM_CHECK(static_cast<int64_t>(out.size()) == rows * vocab, "%zu logits for %lld rows of %lld",
           out.size(), static_cast<long long>(rows), static_cast<long long>(vocab));
  step_.started_head = nullptr;  // its logits are overwritten
  const int64_t room = workspace_.sampler->sizes().rows;
  for (int64_t begin = 0; begin < rows; begin += room) {
    const int64_t count = std::min(room, rows - begin);
    LogitsArgs part = args;
    part.x = args.x.rows(begin, count);
    compute_logits(part, nullptr, static_cast<int>(count));
    download(out.data() + begin * vocab,
             ConstTensorView(workspace_.sampler->logits(), DType::f32, {count, vocab}));
  }
}

// ---- vision ops ----------------------------------------------------------------------------------

void CudaBackend::patchify(const PatchifyArgs& args) {
  use_device();
  const size_t bytes = args.tiles.bytes();
  if (!tiles_ || tiles_->bytes() < bytes) {
    synchronize();
    tiles_.reset();
    tiles_ = pool_.allocate(bytes);
  }
  staged_upload_->copy(tiles_->data(), args.tiles.data, bytes, context_.stream);
  PatchifyLaunch launch_args{.tiles = static_cast<const uint8_t*>(tiles_->data()),
                             .patches = args.patches.data,
                             .num_tiles = static_cast<int>(args.tiles.dim(0)),
                             .image_size = static_cast<int>(args.tiles.dim(1)),
                             .patch_size = args.patch_size};
  std::copy_n(args.mean, 3, launch_args.mean);
  std::copy_n(args.std, 3, launch_args.std);
  cuda::patchify(context_, dtype_, launch_args);
}

void CudaBackend::vision_embed(const VisionEmbedArgs& args) {
  use_device();
  const auto tokens = static_cast<int>(args.x.dim(0) / args.num_tiles);
  cuda::vision_embed(context_, dtype_, args.patches.data, floats(args.cls), floats(args.positions),
                     args.x.data, args.num_tiles, tokens - 1,
                     static_cast<int>(args.x.row_elements()));
}

void CudaBackend::vision_attention(const VisionAttentionArgs& args) {
  use_device();
  const int64_t columns = static_cast<int64_t>(args.num_heads) * args.head_dim;
  const Norm* norms[2] = {args.q_norm, args.k_norm};
  for (int part = 0; part < 2; ++part) {
    if (norms[part] == nullptr) continue;
    void* x = static_cast<char*>(args.qkv.data) + part * columns * 2;
    cuda::norm(context_, dtype_,
               {.kind = norms[part]->kind,
                .weight = floats(norms[part]->weight),
                .bias = floats(norms[part]->bias),
                .eps = norms[part]->eps,
                .x = x,
                .y = x,
                .ldx = 3 * columns,
                .ldy = 3 * columns,
                .rows = static_cast<int>(args.qkv.dim(0)),
                .columns = static_cast<int>(columns)});
  }
  tile_attention(context_, dtype_,
                 {.qkv = args.qkv.data,
                  .y = args.y.data,
                  .num_tiles = args.num_tiles,
                  .tokens = args.tokens_per_tile,
                  .num_heads = args.num_heads,
                  .head_dim = args.head_dim,
                  .softmax_scale = softmax_scale(0.0F, args.head_dim)});
}

void CudaBackend::pixel_shuffle(const PixelShuffleArgs& args) {
  use_device();
  cuda::pixel_shuffle(context_, args.x.data, args.y.data, args.num_tiles, args.grid, args.factor,
                      static_cast<int>(args.x.row_elements()));
}

}  // namespace turbomind::cuda
