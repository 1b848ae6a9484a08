// Launchers of every kernel that is not a GEMM. All asynchronous on the context's stream; shapes in
// the letters of backend.h. Pointers are device pointers unless said otherwise.
#pragma once

#include <cstdint>

#include "backend/cuda/cuda_check.h"
#include "backend/op_kinds.h"

namespace turbomind::cuda {

inline constexpr int kBlockTokens = 64;   // tokens of a KV block: one kernel tile of keys
inline constexpr int kSplitTokens = 256;  // keys of a part of attention's definition (flash.cuh)
inline constexpr int kQueryTile = 128;    // query rows of a prefill work item
inline constexpr int kMaxDecodeRows = 8;  // rows of a sequence that the decode kernel takes: a new
                                          // token and the drafts after it

// Device arrays of the current step, at fixed addresses so that captured graphs stay valid. A kernel may
// read them before it waits for the one before it: unpack_step, which writes them, lets no kernel start
// before it has ended.
struct StepArrays {
  int32_t* token_ids = nullptr;     // [T]
  int32_t* positions = nullptr;     // [T]
  int32_t* slots = nullptr;         // [T], -1 on padding rows
  int32_t* query_start = nullptr;   // [S + 1]
  int32_t* kv_len = nullptr;        // [S]
  int32_t* sample_rows = nullptr;   // [R]
  int32_t* split_start = nullptr;   // [S] first decode item of the sequence
  int2* decode_items = nullptr;     // (sequence, part), sequence -1 on padding
  int2* query_tiles = nullptr;      // (sequence, first query row of the tile within it)
  int32_t* block_stride = nullptr;  // [3] row length of block_table; decode items without padding;
                                    // which of its two places the sampler's results go to
  int32_t* block_table = nullptr;   // [S, block_stride]
};

// Copies the packed words of one step, just uploaded to `blob`, to the arrays. Where ids are fed, word i
// of the first entry is ids[fed_from[i]] unless fed_from[i] is negative.
struct UnpackEntry {
  int32_t* destination = nullptr;
  int32_t source_word = 0;  // offset in blob
  int32_t words = 0;
};
inline constexpr int kUnpackEntries = 11;
struct UnpackArgs {
  const int32_t* blob = nullptr;
  UnpackEntry entries[kUnpackEntries];
  int32_t fed_from_word = -1;    // offset in blob of as many words as the first entry has; -1: none
  const int32_t* ids = nullptr;  // of the step before
};
void unpack_step(const LaunchContext& context, const UnpackArgs& args);

struct NormArgs {
  NormKind kind = NormKind::rms;
  const float* weight = nullptr;  // [C]
  const float* bias = nullptr;    // [C] or null
  float eps = 1e-6F;
  const void* x = nullptr;  // [*, C] with row stride ldx
  void* y = nullptr;        // [rows, C] with row stride ldy; may be x
  int64_t ldx = 0;
  int64_t ldy = 0;
  const int32_t* gather = nullptr;  // row i of y comes from row gather[i] of x; null: i
  int rows = 0;
  int columns = 0;  // C
};
void norm(const LaunchContext& context, DType dtype, const NormArgs& args);

// y[i] = x[gather ? gather[i] : i], rows of `columns`, zeros up to `ldy`.
void copy_rows(const LaunchContext& context, const void* x, int64_t ldx, const int32_t* gather,
               void* y, int64_t ldy, int rows, int columns);

void embed(const LaunchContext& context, const void* table, int64_t ld_table, int64_t vocab,
           const int32_t* token_ids, void* x, int rows, int columns);

// What happens to a head of q or k before attention: an optional RMSNorm, then the rotation.
struct RopeArgs {
  const float* inv_freq = nullptr;  // [D / 2]
  float attention_scaling = 1.0F;
  const float* q_norm = nullptr;  // [D] or null
  const float* k_norm = nullptr;
  float q_norm_eps = 0.0F;
  float k_norm_eps = 0.0F;
};

struct RopeKvArgs {
  void* qkv = nullptr;    // [T, (Hq + 2 Hkv) * D]; q is rotated in place
  void* cache = nullptr;  // a layer: [B, Hkv, 2 (K, V)] tiles of kv_tile_bytes
  int kv_bits = 16;
  RopeArgs rope;
  const int32_t* positions = nullptr;  // [T]
  const int32_t* slots = nullptr;      // [T]
  int tokens = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
};
void rope_kv(const LaunchContext& context, DType dtype, const RopeKvArgs& args);

// Bytes of the keys, or of the values, of one block and KV head: device/kv_tile.cuh.
size_t kv_tile_bytes(int head_dim, int bits);

struct DecodeAttentionArgs {
  const void* qkv = nullptr;  // [T, (Hq + 2 Hkv) * D]
  void* y = nullptr;          // [T, Hq * D]
  void* cache = nullptr;
  int kv_bits = 16;
  // With frequencies: qkv is as the projection left it, and the kernel does rope_kv's work on the rows
  // that it takes, to the same bits. Without: q is rotated, K and V are in the cache.
  RopeArgs rope;
  StepArrays step;
  int num_items = 0;  // with padding
  int max_rows = 1;   // most rows of a sequence with items
  // [items * max_rows, decode_record_bytes()]: parts on their way between CTAs; all bits set between launches.
  uint32_t* records = nullptr;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float softmax_scale = 0.0F;
};
size_t decode_record_bytes(int num_heads, int head_dim);
void decode_attention(const LaunchContext& context, DType dtype, const DecodeAttentionArgs& args);

struct PrefillAttentionArgs {
  const void* qkv = nullptr;
  void* y = nullptr;
  const void* cache = nullptr;
  int kv_bits = 16;
  StepArrays step;
  int tokens = 0;     // T
  int num_tiles = 0;  // query tiles of the step
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float softmax_scale = 0.0F;
  bool portable = false;  // mma.sync even where wgmma could run: for tests and benchmarks
};
void prefill_attention(const LaunchContext& context, DType dtype, const PrefillAttentionArgs& args);

struct TileAttentionArgs {    // non-causal, contiguous keys: the vision tower
  const void* qkv = nullptr;  // [n * tokens, 3 * C]
  void* y = nullptr;          // [n * tokens, C]
  int num_tiles = 0;
  int tokens = 0;
  int num_heads = 0;
  int head_dim = 0;
  float softmax_scale = 0.0F;
  bool portable = false;
};
void tile_attention(const LaunchContext& context, DType dtype, const TileAttentionArgs& args);

// One pass over rows of logits: the largest of each block of 64 to block_max [rows, ceil(V / 64)] and
// the index of the row's largest, the lowest index among equals, to ids and to host_ids; or, instead
// of an index, kNotFinite where a logit is NaN or +infinity, kNoTokenLeft where all are -infinity.
// `scratch` has scan_scratch_bytes(max_rows) bytes, zeroed once.
inline constexpr int32_t kNotFinite = -1;
inline constexpr int32_t kNoTokenLeft = -2;
size_t scan_scratch_bytes(int max_rows);
struct ScanArgs {
  const float* logits = nullptr;  // [rows, V]
  int64_t vocab = 0;
  void* scratch = nullptr;
  int max_rows = 0;
  float* block_max = nullptr;
  int32_t* ids = nullptr;
  int32_t* host_ids = nullptr;    // pinned [2, max_rows]
  const int32_t* slot = nullptr;  // which half of host_ids, read when the kernel runs; null: 0
};
void scan_logits(const LaunchContext& context, const ScanArgs& args, int rows);

// What sample_rows can serve; the host's sampler does the rest.
inline constexpr int kMaxSampleVocab = 1 << 19;
inline constexpr int kMaxBestTokens = 1024;        // top-k, and best tokens reported
inline constexpr int kMaxSampleCompletion = 6144;  // tokens that frequency and presence count

// One row's sampling. Offsets are in words of SampleRowsArgs::words.
struct SampleTask {
  uint64_t seed = 0;
  uint32_t completion_idx = 0;
  int32_t row = 0;        // of the logits
  int32_t do_sample = 0;  // 0: the best token
  float temperature = 1;
  float top_p = 1;
  float min_p = 0;
  int32_t top_k = 0;
  float repetition_penalty = 1;
  float frequency_penalty = 0;
  float presence_penalty = 0;
  int32_t num_logprobs = 0;
  int32_t top = 0;     // first entry in SampleRowsArgs::top
  int32_t spare = -1;  // row of SampleRowsArgs::spare, if raw logits must outlive the edits
  int32_t edits = 0;   // whether any of the following changes a logit
  int32_t tokens = 0;  // prompt and completion: ids
  int32_t num_tokens = 0;
  int32_t num_completion = 0;  // the last ones of tokens
  int32_t fed_row = -1;        // row of T whose id is the last of tokens; -1: tokens has it
  int32_t bias = 0;            // pairs of id and f32
  int32_t num_bias = 0;
  int32_t bans = 0;  // ids within the vocabulary
  int32_t num_bans = 0;
  int32_t allowed = -1;  // bits; -1: all are allowed
  int32_t allowed_words = 0;
};

enum class SampleOutcome : int32_t { ok, not_finite, all_banned };
struct SampleOutput {
  SampleOutcome status = SampleOutcome::ok;
  int32_t token = -1;
  float raw_logit = 0;   // of `token`; the rest with num_logprobs only
  float raw_max = 0;     // the largest logit before edits
  double raw_total = 0;  // sum of exp(logit - raw_max)
};
struct TopLogit {
  float logit = 0;
  int32_t id = 0;
};

struct SampleRowsArgs {
  const SampleTask* tasks = nullptr;
  const uint32_t* words = nullptr;
  float* logits = nullptr;  // [*, V]; edits are made in place
  int64_t vocab = 0;
  const float* block_max = nullptr;    // of scan_logits
  int32_t* ids = nullptr;              // of scan_logits; rows of tasks get the token drawn
  const int32_t* token_ids = nullptr;  // [T] of the step, for tasks with a fed_row
  float* spare = nullptr;              // [*, V]
  SampleOutput* outputs = nullptr;     // [tasks]
  TopLogit* top = nullptr;             // best first
};
size_t sample_rows_shared_bytes(int64_t vocab);
void sample_rows(const LaunchContext& context, const SampleRowsArgs& args, int tasks);

struct PatchifyLaunch {
  const uint8_t* tiles = nullptr;  // [n, S, S, 3]
  void* patches = nullptr;         // [n * P, 3 * p * p]
  int num_tiles = 0;
  int image_size = 0;
  int patch_size = 0;
  float mean[3] = {};
  float std[3] = {};
};
void patchify(const LaunchContext& context, DType dtype, const PatchifyLaunch& args);
void vision_embed(const LaunchContext& context, DType dtype, const void* patches, const float* cls,
                  const float* positions, void* x, int num_tiles, int num_patches, int columns);
void pixel_shuffle(const LaunchContext& context, const void* x, void* y, int num_tiles, int grid,
                   int factor, int columns);

// Loading. Any of f32, f16, bf16 to f32; and a dense matrix [rows, columns] to T [*, ld], row r
// going to row row_map(r): base + r, or for interleaved halves 16 * (r / 8) + r % 8 + 8 * part.
enum class RowMap : uint8_t { plain, gate, up };
void convert_vector(const LaunchContext& context, const void* source, DType source_type, float* out,
                    int64_t count, RowMap map, int64_t base);
void convert_matrix(const LaunchContext& context, const void* source, DType source_type, void* out,
                    DType out_type, int64_t rows, int64_t columns, int64_t ld, RowMap map,
                    int64_t base);

}  // namespace turbomind::cuda
