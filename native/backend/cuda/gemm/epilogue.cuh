// The end of every GEMM kernel: an f32 tile in shared memory, segments added in order, then bias,
// activation, residual and one rounding on the way to y; factors and by-products of a norm beside it
// (split_norm.cuh). Device only.
#pragma once

#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/gemm/gemm_table.h"
#include "backend/cuda/gemm/split_norm.cuh"

namespace turbomind::cuda {

struct EpilogueParams {
  const float* bias = nullptr;   // [n_padded] or null
  const float* scale = nullptr;  // [n] or null
  void* y = nullptr;
  int64_t ldy = 0;
  int m = 0;
  int n = 0;  // rows of W
  Epilogue kind = Epilogue::none;
  bool y_is_f32 = false;
  InputNorm input_norm;
  NextNorm next_norm;
};

// Where the segments of one output tile meet when several CTAs share them.
struct SplitParams {
  float* partials = nullptr;  // [row tiles, token tiles, segments, kTileT, kTileN]
  uint32_t* tickets = nullptr;
  bool split = false;  // each CTA along z has one segment
};

inline EpilogueParams epilogue_params(const GemmArgs& args) {
  return {.bias = args.w->bias,
          .scale = args.scale,
          .y = args.y,
          .ldy = args.ldy,
          .m = args.m,
          .n = static_cast<int>(args.w->n),
          .kind = args.epilogue,
          .y_is_f32 = args.y_is_f32,
          .input_norm = args.input_norm,
          .next_norm = args.next_norm};
}

// Whether segments go to CTAs of their own. One CTA in turn takes the time of all its columns; shared,
// they take rounds of a segment each and then the meeting, which costs as much as about `kMeeting`
// times 128 columns for 128 tokens. Small token tiles always share: they only stream weights.
inline bool sharing_pays(int segments, int64_t k_padded, int64_t output_tiles, int tile_tokens,
                         int num_sms) {
  if (segments == 1 || output_tiles >= 2 * num_sms) return false;
  if (tile_tokens <= 32) return true;
  constexpr int64_t kMeeting = 14;
  const int64_t columns = k_padded / 128;
  const int64_t rounds = (output_tiles * segments + num_sms - 1) / num_sms;
  return columns / segments * rounds + kMeeting * tile_tokens / 128 < columns;
}

__device__ __forceinline__ float gelu(float x) {
  return 0.5F * x * (1.0F + erff(x * 0.70710678118654752F));
}
__device__ __forceinline__ float silu(float x) { return x / (1.0F + __expf(-x)); }

template <class T>
__device__ __forceinline__ void store8(const EpilogueParams& p, int64_t offset, float (&v)[8],
                                       int count) {
  if (p.y_is_f32) {
    float* y = static_cast<float*>(p.y) + offset;
    for (int i = 0; i < count; ++i) y[i] = v[i];
    return;
  }
  T* y = static_cast<T*>(p.y) + offset;
  if (count == 8 && p.ldy % 8 == 0) {
    *reinterpret_cast<uint4*>(y) = pack8<T>(v);
  } else {
    for (int i = 0; i < count; ++i) y[i] = from_float<T>(v[i]);
  }
}

__device__ __forceinline__ bool is_aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}
__device__ __forceinline__ void load8(const float* from, float (&v)[8]) {
  *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(from);
  *reinterpret_cast<float4*>(v + 4) = *reinterpret_cast<const float4*>(from + 4);
}

// v = residual + scale * v for eight outputs at y: all loads in flight together.
template <class T>
__device__ __forceinline__ void add_residual8(const float* scale, const T* y, float (&v)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(y);
  float scales[8] = {1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F};
  if (scale != nullptr) load8(scale, scales);
  float old[8];
  unpack8<T>(bits, old);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = fmaf(v[i], scales[i], old[i]);
}

// Eight neighbouring outputs of token t, from row n of W. `other` holds the up outputs of silu_mul; both
// are sums, to be multiplied by the token's factor.
template <class T, Strips kStrips = Strips::either>
__device__ __forceinline__ void finish8(const EpilogueParams& p, int t, int n, float (&v)[8],
                                        float (&other)[8], float factor) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= factor;
  if (p.bias != nullptr) {
    float bias[8];
    load8(p.bias + n, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += bias[i];
  }
  if (p.kind == Epilogue::silu_mul) {
#pragma unroll
    for (int i = 0; i < 8; ++i) other[i] *= factor;
    if (p.bias != nullptr) {
      float bias[8];
      load8(p.bias + n + 8, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) other[i] += bias[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = silu(v[i]) * other[i];
    store8<T>(p, t * p.ldy + n / 2, v, 8);
    return;
  }
  const int count = min(8, p.n - n);
  const int64_t offset = t * p.ldy + n;
  if (p.kind == Epilogue::gelu) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = gelu(v[i]);
  }
  if (p.kind == Epilogue::residual) {
    const T* y = static_cast<const T*>(p.y) + offset;
    if (count == 8 && is_aligned16(y) && is_aligned16(p.scale)) {
      add_residual8<T>(p.scale != nullptr ? p.scale + n : nullptr, y, v);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i >= count) break;
        v[i] = fmaf(v[i], p.scale != nullptr ? p.scale[n + i] : 1.0F, to_float(y[i]));
      }
    }
    if (p.next_norm.weight != nullptr) store_next8<T, kStrips>(p.next_norm, p.n, t, n, v);
  }
  store8<T>(p, offset, v, count);
}

// The same for one output of row n, in three steps so that a kernel can ask early for what it needs.
struct OutputTerms {
  float bias = 0.0F;
  float up_bias = 0.0F;
  float scale = 1.0F;
  float old = 0.0F;
  float next_weight = 0.0F;
};
template <class T>
__device__ __forceinline__ OutputTerms load_terms(const EpilogueParams& p, int t, int n) {
  OutputTerms terms;
  if (p.bias != nullptr) {
    terms.bias = p.bias[n];
    if (p.kind == Epilogue::silu_mul) terms.up_bias = p.bias[n + 8];
  }
  if (p.kind == Epilogue::residual) {
    if (p.scale != nullptr) terms.scale = p.scale[n];
    terms.old = to_float(static_cast<const T*>(p.y)[t * p.ldy + n]);
    if (p.next_norm.weight != nullptr) terms.next_weight = p.next_norm.weight[n];
  }
  return terms;
}
__device__ __forceinline__ float finish_value(const EpilogueParams& p, const OutputTerms& terms,
                                              float v, float up) {
  if (p.bias != nullptr) v += terms.bias;
  if (p.kind == Epilogue::silu_mul) {
    if (p.bias != nullptr) up += terms.up_bias;
    return silu(v) * up;
  }
  if (p.kind == Epilogue::gelu) return gelu(v);
  return p.kind == Epilogue::residual ? fmaf(v, terms.scale, terms.old) : v;
}
template <class T>
__device__ __forceinline__ void store_output(const EpilogueParams& p, const OutputTerms& terms,
                                             int t, int n, float v) {
  const int column = p.kind == Epilogue::silu_mul ? n / 16 * 8 + n % 8 : n;
  if (p.y_is_f32) {
    static_cast<float*>(p.y)[t * p.ldy + column] = v;
  } else {
    static_cast<T*>(p.y)[t * p.ldy + column] = from_float<T>(v);
  }
  if (p.next_norm.weight != nullptr) {
    store_next<T>(p.next_norm, p.n, t, n, v, terms.next_weight);
  }
}

template <int kTileN>
inline constexpr int kTileStride = kTileN + 4;  // floats; keeps fragment stores free of conflicts

// Four f32 at y, the first `count` of them, as wide as y lies. Logits: a vocabulary is rarely a multiple
// of four, and stores one by one write each sector of L2 as often as it has values.
__device__ __forceinline__ void store_floats(float* y, const float (&v)[4], int count) {
  const auto address = reinterpret_cast<uintptr_t>(y);
  if (count >= 4 && address % 16 == 0) {
    *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(v);
  } else if (count >= 4 && address % 8 == 0) {
    *reinterpret_cast<float2*>(y) = {v[0], v[1]};
    *reinterpret_cast<float2*>(y + 2) = {v[2], v[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) y[i] = v[i];
    }
  }
}

// Past the last row of W of a tile of `rows` of kTileN rows from n0 on.
template <int kTileN>
__device__ __forceinline__ int end_of_rows(const EpilogueParams& p, int n0, int rows) {
  return rows < kTileN ? min(p.n, n0 + rows) : p.n;
}

// store_rows for f32 outputs without an epilogue but the bias: neighbouring lanes store what lies
// side by side.
template <int kTileN, class Read>
__device__ __forceinline__ void store_f32_rows(const EpilogueParams& p, int t0, int tokens, int n0,
                                               int rows, const float* scales, int first, int step,
                                               Read&& read) {
  constexpr int kQuads = kTileN / 4;
  const int row_end = end_of_rows<kTileN>(p, n0, rows);
  const int end = min(tokens, p.m - t0) * kQuads;
  for (int i = first; i < end; i += step) {
    const int t = i / kQuads;
    const int n = n0 + i % kQuads * 4;
    if (n >= row_end) continue;
    float v[4];
    *reinterpret_cast<float4*>(v) = read(t, i % kQuads * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] *= scales[t];
      if (p.bias != nullptr) v[j] += p.bias[n + j];
    }
    store_floats(static_cast<float*>(p.y) + (t0 + t) * p.ldy + n, v, p.n - n);
  }
}

// Parts of a token's outputs in store_rows.
template <int kTileN>
__device__ __forceinline__ int pieces_of_row(const EpilogueParams& p) {
  if (p.kind == Epilogue::silu_mul) return kTileN / 16;
  return p.y_is_f32 && p.kind == Epilogue::none ? kTileN / 4 : kTileN / 8;
}

// Finishes a tile of `rows` of kTileN rows of W x `tokens` tokens, whose parts `first`, `first + step`, … are this
// thread's. scales: of the tile's tokens. read(t, n): four neighbouring f32 of token t0 + t, from row
// n0 + n.
template <class T, int kTileN, Strips kStrips = Strips::either, class Read>
__device__ __forceinline__ void store_rows(const EpilogueParams& p, int t0, int tokens, int n0,
                                           int rows, const float* scales, int first, int step,
                                           Read&& read) {
  if (p.y_is_f32 && p.kind == Epilogue::none) {
    return store_f32_rows<kTileN>(p, t0, tokens, n0, rows, scales, first, step, read);
  }
  const int row_end = end_of_rows<kTileN>(p, n0, rows);
  const bool gated = p.kind == Epilogue::silu_mul;
  const int pieces = pieces_of_row<kTileN>(p);
  const int end = min(tokens, p.m - t0) * pieces;
  for (int i = first; i < end; i += step) {
    const int t = i / pieces;
    const int local = (i % pieces) * (gated ? 16 : 8);
    if (n0 + local >= row_end) continue;
    float v[8];
    float other[8] = {};
    *reinterpret_cast<float4*>(v) = read(t, local);
    *reinterpret_cast<float4*>(v + 4) = read(t, local + 4);
    if (gated) {
      *reinterpret_cast<float4*>(other) = read(t, local + 8);
      *reinterpret_cast<float4*>(other + 4) = read(t, local + 12);
    }
    finish8<T, kStrips>(p, t0 + t, n0 + local, v, other, scales[t]);
  }
}

// Publishes this CTA's segment and, in the CTA that comes last, leaves the sum of all segments, in
// order, in `tile`. Returns whether this is that CTA. All kThreads threads call it.
template <int kTileT, int kTileN, int kThreads, class Sync>
__device__ __forceinline__ bool meet_segments(float* tile, const SplitParams& split, int segment,
                                              int segments, int64_t output_tile, int valid_tokens,
                                              int thread, bool* shared_last, Sync&& sync) {
  constexpr int kQuads = kTileN / 4;
  float* all = split.partials + output_tile * segments * kTileT * kTileN;
  float4* mine = reinterpret_cast<float4*>(all + static_cast<int64_t>(segment) * kTileT * kTileN);
  for (int i = thread; i < valid_tokens * kQuads; i += kThreads) {
    __stcg(mine + i, *reinterpret_cast<const float4*>(tile + i / kQuads * kTileStride<kTileN> +
                                                      i % kQuads * 4));
  }
  sync();
  if (thread == 0) {  // its fences cover what the CTA wrote before, and reads after, the barriers
    __threadfence();
    *shared_last =
        atomicAdd(&split.tickets[output_tile], 1U) == static_cast<uint32_t>(segments) - 1;
    __threadfence();
  }
  sync();
  if (!*shared_last) return false;
  for (int i = thread; i < valid_tokens * kQuads; i += kThreads) {
    float4 sum = __ldcg(reinterpret_cast<const float4*>(all) + i);
    for (int s = 1; s < segments; ++s) {
      const float4 part = __ldcg(
          reinterpret_cast<const float4*>(all + static_cast<int64_t>(s) * kTileT * kTileN) + i);
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
    *reinterpret_cast<float4*>(tile + i / kQuads * kTileStride<kTileN> + i % kQuads * 4) = sum;
  }
  if (thread == 0) split.tickets[output_tile] = 0;
  sync();
  return true;
}

}  // namespace turbomind::cuda
