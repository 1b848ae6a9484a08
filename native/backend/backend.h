// The seam between models and devices: about fifteen ops, each a whole step of a layer so that a
// backend may fuse it. No device type appears. One engine thread calls a backend; ops run in call
// order and may be asynchronous until `synchronize` or a call that returns host data.
//
// Letters: T tokens of the step, R rows sampled, H hidden, Hq/Hkv heads, D head_dim, K/N of a
// linear layer, V vocabulary, n tiles, P patches of a tile (class token not counted).
// Activations are `activation_dtype()`, row-major, contiguous.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "backend/op_kinds.h"
#include "backend/weights.h"
#include "base/error.h"
#include "base/sampling.h"
#include "base/tensor_view.h"

namespace turbomind {

// Device memory that dies with its owner.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() = 0;
  virtual size_t bytes() const = 0;
};

// A matrix in a backend's own layout. Immutable after loading; shared read-only.
class LinearWeight {
 public:
  virtual ~LinearWeight() = default;
  virtual int64_t in_features() const = 0;   // K
  virtual int64_t out_features() const = 0;  // N, all parts
  virtual size_t bytes() const = 0;
};

struct KvCacheSpec {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_size = 64;  // tokens a block
  int num_blocks = 0;
  // 16: the backend's unquantised format (f32 on the CPU). 8 | 4, per token and head over D, keys
  // after RoPE: scale = (max - min) / (2^bits - 1) and zero = min, both rounded to f16;
  // q = round_half_even((x - zero) / scale) within 0 .. 2^bits - 1, 0 where scale is 0;
  // x ~ q * scale + zero. Attention reads these values for the step's own tokens too.
  int bits = 16;
};

class KvCache {
 public:
  virtual ~KvCache() = default;
  virtual const KvCacheSpec& spec() const = 0;
};

// One step, flattened on the host. Valid from `begin_step` until the step's results were read.
struct StepBatch {
  std::span<const TokenId> token_ids;    // [T]
  std::span<const int32_t> positions;    // [T]
  std::span<const int32_t> slots;        // [T] block * block_size + offset, where K and V go
  std::span<const int32_t> query_start;  // [S + 1] rows of sequence s: [query_start[s], [s + 1])
  std::span<const int32_t> kv_len;       // [S] tokens of the sequence once this step is written
  std::span<const int32_t> block_table;  // [S, max_blocks], -1 past a sequence's end
  int max_blocks = 0;
  std::span<const int32_t> sample_rows;  // [R] rows of T whose next token is wanted
  // Running ahead: [T] or empty. Row of the last launch_sample (of R there) whose token is the id of
  // this row, which the host does not know yet; -1: token_ids has it. SampleRow::tokens of a fed row
  // ends in a place for that id.
  std::span<const int32_t> fed_from{};
  int num_tokens() const { return static_cast<int>(token_ids.size()); }
  int num_sequences() const { return static_cast<int>(kv_len.size()); }
};

// y = norm(x) * weight (+ bias); weight and bias are f32 device vectors of the row's length.
struct Norm {
  NormKind kind = NormKind::rms;
  ConstTensorView weight;
  ConstTensorView bias;  // layer norm only; may be empty
  float eps = 1e-6F;
};

struct LinearArgs {
  const LinearWeight* weight = nullptr;
  const Norm* norm = nullptr;  // applied to x first, or null
  ConstTensorView x;           // [T, K]
  TensorView y;                // [T, N], or [T, N / 2] for silu_mul
  Epilogue epilogue = Epilogue::none;
  ConstTensorView scale{};  // residual only (InternViT's layer scale)
  // The norm through which the next linear ops read y, where the model knows it: a backend may do a part
  // of it while it writes y, or ignore it, since those ops name their norm themselves. Whether it does
  // must not depend on T. y is the same with it and without.
  const Norm* next_norm = nullptr;
};

// Image rows of the step: rows [row, row + count) of x take embeddings[offset, offset + count).
struct EmbeddingOverride {
  int row = 0;
  ConstTensorView embeddings;  // [count, H]
};

struct EmbedArgs {
  const LinearWeight* table = nullptr;  // loaded with load_embedding
  TensorView x;                         // [T, H]; ids come from the current step
  std::span<const EmbeddingOverride> overrides;
};

struct Rope {
  ConstTensorView inv_freq;        // [D / 2] f32 device vector; half-split rotation (Llama, Qwen)
  float attention_scaling = 1.0F;  // multiplies cos and sin (yarn, longrope)
};

// RoPE on q and k, K and V written to their slots, then causal attention of every query row over
// its sequence's paged tokens. Softmax scale is 1 / sqrt(D) unless set.
struct AttentionArgs {
  TensorView qkv;  // [T, (Hq + 2 Hkv) * D]: q heads, k heads, v heads; may be overwritten
  TensorView y;    // [T, Hq * D]
  KvCache* cache = nullptr;
  int layer = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  Rope rope;
  const Norm* q_norm = nullptr;  // per head over D (Qwen3), before RoPE; or null
  const Norm* k_norm = nullptr;
  float softmax_scale = 0.0F;  // 0: 1 / sqrt(D)
};

// Non-causal attention inside each tile.
struct VisionAttentionArgs {
  TensorView qkv;  // [n * (P + 1), 3 * C]; may be overwritten
  TensorView y;    // [n * (P + 1), C]
  int num_tiles = 0;
  int tokens_per_tile = 0;  // P + 1
  int num_heads = 0;
  int head_dim = 0;
  const Norm* q_norm = nullptr;  // RMSNorm over the whole C (InternViT-6B), or null
  const Norm* k_norm = nullptr;
};

// Pixels to patch rows: patch (r, c) of a tile becomes row r * (S / p) + c, its values in
// (channel, y, x) order, each (value / 255 - mean[channel]) / std[channel].
struct PatchifyArgs {
  ConstTensorView tiles;  // [n, S, S, 3] u8, host memory
  TensorView patches;     // [n * P, 3 * p * p]
  int patch_size = 0;
  float mean[3] = {0, 0, 0};
  float std[3] = {1, 1, 1};
};

// x[t, 0] = cls + pos[0]; x[t, 1 + i] = patches[t * P + i] + pos[1 + i].
struct VisionEmbedArgs {
  ConstTensorView patches;    // [n * P, C]
  ConstTensorView cls;        // [C] f32
  ConstTensorView positions;  // [P + 1, C] f32
  TensorView x;               // [n * (P + 1), C]
  int num_tiles = 0;
};

// Drops the class token and merges f x f patches: output token (r, c) is the concatenation of
// patches (fr, fc), (fr, fc + 1), …, (fr + f - 1, fc + f - 1), row by row ("ps_version" v2).
struct PixelShuffleArgs {
  ConstTensorView x;  // [n * (g * g + 1), C]
  TensorView y;       // [n * (g / f) * (g / f), f * f * C]
  int num_tiles = 0;
  int grid = 0;    // g patches a side
  int factor = 2;  // f
};

// Language model head plus sampling, one op so that a backend need not write logits out.
struct SampleArgs {
  const LinearWeight* head = nullptr;  // loaded with load_head
  const Norm* norm = nullptr;          // final norm
  ConstTensorView x;                   // [T, H]; the step's sample_rows are taken
  std::span<const SampleRow> rows{};   // [R]
  std::span<SampleResult> results{};   // [R]
};

// Scores of rows that nothing is drawn from.
struct LogitsArgs {
  const LinearWeight* head = nullptr;  // loaded with load_head
  const Norm* norm = nullptr;          // final norm
  ConstTensorView x;                   // [n, H], all of them taken; n may exceed max_rows
};

// What a weight is loaded for; a tied head shares its table with the embedding where a device can.
enum class WeightUse : uint8_t { linear, embedding, head, tied_head };

// Memory of a workspace by purpose, in bytes.
struct WorkspaceBytes {
  size_t scratch = 0;   // what ops need beyond their outputs, and the arrays of a step
  size_t sampling = 0;  // logits and what draws from them
  size_t graphs = 0;    // bound of what captured steps take
  size_t staging = 0;   // host memory (pinned where the device wants it); 0 on the CPU
  size_t device_bytes() const { return scratch + sampling + graphs; }
  bool operator==(const WorkspaceBytes&) const = default;
};

// Times the ops between start_timer() and stop() as the device runs them, without waiting for them.
// Its functions never throw: on a lost device, which the ops report, the time is 0.
class OpTimer {
 public:
  virtual ~OpTimer() = default;
  virtual void stop() = 0;  // after the last op
  virtual double ms() = 0;  // waits until the ops before stop() have finished
};

// For devices whose ops have finished when they return.
class HostOpTimer final : public OpTimer {
 public:
  void stop() override { stop_ = Clock::now(); }
  double ms() override { return std::chrono::duration<double, std::milli>(stop_ - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
  Clock::time_point stop_ = start_;
};

struct DeviceInfo {
  std::string name;         // "cpu", "NVIDIA H100 80GB HBM3"
  std::string description;  // instruction sets and threads, or compute capability and driver
  size_t total_bytes = 0;
  size_t free_bytes = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual DeviceInfo info() const = 0;
  virtual DType activation_dtype() const = 0;
  // Rows of a vision batch that keep the device busy; more buys no speed, only memory.
  virtual int vision_rows_per_pass() const { return 1024; }

  // Memory. Fresh buffers hold unspecified bytes. Throws Error{out_of_memory}.
  virtual std::unique_ptr<Buffer> allocate(size_t bytes) = 0;
  virtual void upload(TensorView device, const void* host) = 0;   // device.bytes() bytes
  virtual void download(void* host, ConstTensorView device) = 0;  // waits for the ops before it
  virtual void synchronize() = 0;
  virtual std::unique_ptr<OpTimer> start_timer() { return std::make_unique<HostOpTimer>(); }
  // Host memory that copies to and from the device reach at full speed (pinned where it matters).
  virtual std::unique_ptr<Buffer> allocate_host(size_t bytes) = 0;

  // Sizes, so that memory can be planned before any of it is taken. They read shapes, never data.
  virtual size_t buffer_bytes(size_t bytes) const { return bytes; }  // taken by allocate(bytes)
  virtual size_t weight_bytes(const LinearSource& source, WeightUse use) const = 0;
  // What allocations may take beyond the sum of their sizes: slabs, the driver's own.
  virtual size_t slack_bytes() const { return 0; }
  // Device memory that this backend's live buffers, weights, caches and workspace take now.
  virtual size_t allocated_bytes() const = 0;

  // Weights. Sources are views of mapped files: a backend drops their pages when it has repacked
  // them. A weight may keep views into the mapping; the mapping outlives the backend's weights.
  virtual std::unique_ptr<LinearWeight> load_linear(const LinearSource& source) = 0;
  virtual std::unique_ptr<LinearWeight> load_embedding(ConstTensorView table) = 0;  // [V, H]
  virtual std::unique_ptr<LinearWeight> load_head(const LinearSource& source) = 0;  // [V, H]
  // A small vector (norm weight, bias, position table) as f32 on the device.
  virtual std::unique_ptr<Buffer> load_vector(ConstTensorView source) = 0;

  virtual size_t kv_block_bytes(const KvCacheSpec& spec) const = 0;
  // Throws Error{invalid_argument | unsupported_device} for a spec that its kernels cannot read.
  virtual std::unique_ptr<KvCache> make_kv_cache(const KvCacheSpec& spec) = 0;

  // Whole blocks, all layers, in order with the ops around them.
  // Copies block `first` over block `second` of each pair (copy-on-write). No block is both written
  // and read by one call, nor written twice.
  virtual void copy_blocks(KvCache& cache,
                           std::span<const std::pair<BlockId, BlockId>> from_to) = 0;
  // Block i to and from host + i * kv_block_bytes(spec); the bytes are opaque. Asynchronous: `host`
  // (from allocate_host, for speed) stays untouched until `synchronize`.
  virtual void save_blocks(const KvCache& cache, std::span<const BlockId> blocks, void* host) = 0;
  virtual void load_blocks(KvCache& cache, std::span<const BlockId> blocks, const void* host) = 0;

  // Scratch the ops need beyond their outputs, sized once at load; later ops allocate nothing.
  struct WorkspaceSpec {
    int max_tokens = 0;     // T of a decoder step or rows of a vision batch
    int max_sequences = 0;  // S
    int max_rows = 0;       // R
    int64_t max_in_features = 0;
    int64_t max_out_features = 0;
    int64_t vocab_size = 0;
    int max_kv_len = 0;
    int max_heads = 0;
    int max_head_dim = 0;
    int64_t hidden_size = 0;     // H; 0: max_in_features
    int vision_tile_tokens = 0;  // P + 1; 0: no vision tower
    int vision_head_dim = 0;
    size_t vision_pixel_bytes = 0;  // u8 pixels of one vision batch
    int kv_bits = 16;               // of the cache that attention will read
    int kv_block_size = 64;         // tokens
  };
  virtual WorkspaceBytes workspace_bytes(const WorkspaceSpec& spec) const = 0;
  // Takes workspace_bytes(spec), after all weights are loaded; answers it.
  virtual WorkspaceBytes reserve_workspace(const WorkspaceSpec& spec) = 0;

  // Step.
  virtual void begin_step(const StepBatch& batch) = 0;
  // Runs `forward` now; a device backend may capture it once per (kind, padded size) and replay.
  virtual void execute(const std::function<void()>& forward) = 0;

  // Ops.
  virtual void embed(const EmbedArgs& args) = 0;
  virtual void norm(const Norm& norm, ConstTensorView x, TensorView y) = 0;  // [T, C]; y may be x
  virtual void linear(const LinearArgs& args) = 0;
  virtual void attention(const AttentionArgs& args) = 0;
  // The end of a step's forward, inside `execute`: lets a device begin what sample() or logits()
  // will ask (the logits, the greedy tokens). args has no rows and no results. Optional.
  virtual void start_sample(const SampleArgs& args) { (void)args; }
  virtual void sample(const SampleArgs& args) = 0;  // waits; results are on the host
  // Running ahead: what sample() does in two halves, so that the host plans and launches the next
  // step meanwhile. `launch_sample` starts it and keeps nothing of `args`; it answers false, having
  // done nothing, where these rows cannot be drawn without the host: sample() can. Two may be
  // launched at once, and the second step may name rows of the first in `fed_from`.
  virtual bool launch_sample(const SampleArgs& args) {
    (void)args;
    return false;
  }
  // Waits for the oldest launch and answers its [R] results; throws as sample() does.
  virtual void collect_sample(std::span<SampleResult> results) {
    TM_CHECK(false, "collect_sample of %zu rows without a launch", results.size());
  }
  // All logits of the rows of args.x, f32 on the host: [n, V], to the bit those that sample() looks
  // at. Waits. For logit hooks, requested logits, perplexity and tests.
  virtual void logits(const LogitsArgs& args, std::span<float> out) = 0;
  virtual void patchify(const PatchifyArgs& args) = 0;
  virtual void vision_embed(const VisionEmbedArgs& args) = 0;
  virtual void vision_attention(const VisionAttentionArgs& args) = 0;
  virtual void pixel_shuffle(const PixelShuffleArgs& args) = 0;
};

}  // namespace turbomind
