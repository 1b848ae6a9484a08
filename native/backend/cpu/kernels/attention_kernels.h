// The heart of every attention op: a tile of query rows against one split of keys. Each
// instruction set has its own version; all of them give the same bits, because every score and
// every output is one fma chain in a fixed order and the only other sum (of the exponentials) runs
// over 16 fixed lanes that are added as a fixed tree.
//
// Leaves to its callers: where keys live, what a row may see, and the merging of splits.
#pragma once

#include <cstdint>

#include "backend/cpu/isa.h"

namespace turbomind::cpu {

inline constexpr int kChunkKeys = 64;   // keys behind one pair of pointers
inline constexpr int kSplitKeys = 512;  // most keys of one split
inline constexpr int kMaxChunks = kSplitKeys / kChunkKeys;
inline constexpr int kMaxTileRows = 28;
inline constexpr int kLanes = 16;  // D is a multiple of it
// Floats between rows of queries and scores: fixed, so that a register block needs one address;
// not a power of two, so that rows fall into different cache sets. D is at most kSplitKeys.
inline constexpr int kRowStride = kSplitKeys + kLanes;

// For each row r with limit n = limits[r] > 0, over keys j in [0, n):
//   s_j = (q_r . k_j) * scale;  max = max_j s_j;  p_j = exp(s_j - max);
//   sum = sum_j p_j;  out = sum_j p_j v_j        (not divided by sum)
// Rows with limit <= 0 get max = -inf, sum = 0, out = 0.
struct SplitTask {
  const float* q = nullptr;              // [rows, kRowStride], D of them used
  int rows = 0;                          // <= kMaxTileRows
  int head_dim = 0;                      // D
  const float* const* keys = nullptr;    // per chunk: [D, key_stride], one key a column
  const float* const* values = nullptr;  // per chunk: [kChunkKeys, D]
  int key_stride = 0;
  const int* limits = nullptr;  // [rows]; keys at and past a row's limit are not looked at
  int num_keys = 0;             // the largest limit, <= kSplitKeys
  float scale = 1.0F;
  float* scores = nullptr;  // scratch [rows, kRowStride]
  float* max = nullptr;     // [rows]
  float* sum = nullptr;     // [rows]
  float* out = nullptr;     // [rows, D]
};

// A run of up to kChunkKeys tokens of one head in a quantised cache; see KvCacheSpec::bits.
//   keys 8 bit: [D, key_stride] codes, one token a column; 4 bit: [D / 2, key_stride], the low
//   nibble of row i is dimension 2 i, the high one 2 i + 1.
//   values 8 bit: [tokens, D]; 4 bit: [tokens, D / 2], low nibble j, high nibble j + D / 2.
struct QuantizedChunk {
  const uint8_t* keys = nullptr;
  const uint8_t* values = nullptr;
  const uint16_t* key_scale = nullptr;  // [tokens] f16, and so on
  const uint16_t* key_zero = nullptr;
  const uint16_t* value_scale = nullptr;
  const uint16_t* value_zero = nullptr;
  int key_stride = 0;
  int tokens = 0;    // parameters and codes up to a multiple of kLanes may be read
  int head_dim = 0;  // D, a multiple of kLanes, at least 2 kLanes for 4 bit
};

// One head's vector as codes, one a byte, and the f16 bits of scale and zero.
struct QuantizedVector {
  uint8_t codes[kSplitKeys];
  uint16_t scale;
  uint16_t zero;
};

struct AttentionKernels {
  void (*split)(const SplitTask& task);
  // x [dim] to codes of `bits` bits. A vector that is not finite gets NaN parameters.
  void (*quantize)(const float* x, int dim, int bits, QuantizedVector& out);
  // keys [D, kChunkKeys], values [tokens, D] in f32: what SplitTask reads.
  void (*dequantize8)(const QuantizedChunk& chunk, float* keys, float* values);
  void (*dequantize4)(const QuantizedChunk& chunk, float* keys, float* values);
  // to[c * to_stride + r] = from[r * from_stride + c] for r < kLanes, c < columns (a multiple of 8)
  void (*transpose16)(const float* from, int from_stride, int columns, float* to, int to_stride);
};

extern const AttentionKernels kAttentionReference;  // reference/attention_reference.cc
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;

inline const AttentionKernels& attention_kernels(Isa isa) {
  if (isa >= Isa::avx512) return kAttentionAvx512;
  return isa >= Isa::avx2 ? kAttentionAvx2 : kAttentionReference;
}

// exp(x) for x <= 0, to about 1 ulp; 0 below -87.33; NaN stays NaN. Constants of every version:
// x = n ln 2 + r, exp(r) = 1 + r + r^2 q(r) with q a minimax polynomial on |r| <= ln 2 / 2 (largest
// relative error 3.1e-9 before rounding).
namespace exp_constants {
inline constexpr float kLowest = -87.33F;
inline constexpr float kLog2E = 1.44269504F;
inline constexpr float kRound = 12582912.0F;      // 1.5 * 2^23: adding it rounds to an integer
inline constexpr float kLn2High = 0.693145752F;   // 16 bits of ln 2: n * kLn2High is exact
inline constexpr float kLn2Low = 1.42860677e-6F;  // the rest
inline constexpr float kQ0 = 0x1.fffffcp-2F;
inline constexpr float kQ1 = 0x1.55549p-3F;
inline constexpr float kQ2 = 0x1.5558f8p-5F;
inline constexpr float kQ3 = 0x1.123b02p-7F;
inline constexpr float kQ4 = 0x1.6a2256p-10F;
}  // namespace exp_constants

float exp_nonpositive(float x);  // reference/attention_reference.cc

// Joins one row's next split to what its earlier splits gave; splits are joined in order.
// `total_max` = -inf means that there was none.
void merge_split(float max, float sum, const float* out, int head_dim, float* total_max,
                 float* total_sum, float* total_out);

}  // namespace turbomind::cpu
