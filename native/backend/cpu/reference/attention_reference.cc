// Plain loops for attention: the path of machines without AVX2 and the judge of the fast kernels,
// which must give the same bits. Any thread.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "backend/cpu/kernels/attention_kernels.h"
#include "backend/cpu/kernels/kv_parameters.h"

namespace turbomind::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

float score(const SplitTask& task, int row, int key) {
  const float* q = task.q + row * kRowStride;
  const float* k = task.keys[key / kChunkKeys] + key % kChunkKeys;
  float dot = 0.0F;
  for (int d = 0; d < task.head_dim; ++d) dot = std::fma(q[d], k[d * task.key_stride], dot);
  return dot * task.scale;
}

// Lane l holds the sum over keys l, l + 16, …; lanes meet as (l, l + 8), (l, l + 4), (l, l + 2), …
float add_lanes(float (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

void attend_row(const SplitTask& task, int row) {
  float* out = task.out + row * task.head_dim;
  std::fill(out, out + task.head_dim, 0.0F);
  task.max[row] = kMinusInfinity;
  task.sum[row] = 0.0F;
  const int limit = task.limits[row];
  if (limit <= 0) return;

  float* p = task.scores + row * kRowStride;
  float max = kMinusInfinity;
  for (int j = 0; j < limit; ++j) {
    p[j] = score(task, row, j);
    max = p[j] > max ? p[j] : max;
  }
  float lanes[kLanes] = {};
  for (int j = 0; j < limit; ++j) {
    p[j] = exp_nonpositive(p[j] - max);
    lanes[j % kLanes] += p[j];
  }
  for (int j = 0; j < limit; ++j) {
    const float* v = task.values[j / kChunkKeys] + (j % kChunkKeys) * task.head_dim;
    for (int d = 0; d < task.head_dim; ++d) out[d] = std::fma(p[j], v[d], out[d]);
  }
  task.max[row] = max;
  task.sum[row] = add_lanes(lanes);
}

void split_reference(const SplitTask& task) {
  for (int row = 0; row < task.rows; ++row) attend_row(task, row);
}

void quantize_reference(const float* x, int dim, int bits, QuantizedVector& out) {
  const auto [least, most] = std::minmax_element(x, x + dim);
  const bool finite = std::all_of(x, x + dim, [](float v) { return std::isfinite(v); });
  const float levels = static_cast<float>((1 << bits) - 1);
  set_parameters(finite, *least, *most, levels, out);
  const float scale = f16_to_f32(out.scale);
  const float zero = f16_to_f32(out.zero);
  for (int d = 0; d < dim; ++d) {
    const float q = scale > 0.0F ? std::nearbyint((x[d] - zero) / scale) : 0.0F;
    out.codes[d] = static_cast<uint8_t>(std::clamp(q, 0.0F, levels));
  }
}

// `code(token, dimension)` of keys, then of values.
template <class KeyCode, class ValueCode>
void dequantize(const QuantizedChunk& chunk, float* keys, float* values, KeyCode&& key_code,
                ValueCode&& value_code) {
  const int dim = chunk.head_dim;
  for (int j = 0; j < chunk.tokens; ++j) {
    const float key_scale = f16_to_f32(chunk.key_scale[j]);
    const float key_zero = f16_to_f32(chunk.key_zero[j]);
    const float value_scale = f16_to_f32(chunk.value_scale[j]);
    const float value_zero = f16_to_f32(chunk.value_zero[j]);
    for (int d = 0; d < dim; ++d) {
      keys[d * kChunkKeys + j] = std::fma(key_code(j, d), key_scale, key_zero);
      values[j * dim + d] = std::fma(value_code(j, d), value_scale, value_zero);
    }
  }
}

void dequantize8_reference(const QuantizedChunk& chunk, float* keys, float* values) {
  dequantize(
      chunk, keys, values,
      [&](int j, int d) { return static_cast<float>(chunk.keys[d * chunk.key_stride + j]); },
      [&](int j, int d) { return static_cast<float>(chunk.values[j * chunk.head_dim + d]); });
}

void dequantize4_reference(const QuantizedChunk& chunk, float* keys, float* values) {
  const int half = chunk.head_dim / 2;
  const auto nibble = [](uint8_t byte, bool high) {
    return static_cast<float>(high ? byte >> 4 : byte & 15);
  };
  dequantize(
      chunk, keys, values,
      [&](int j, int d) { return nibble(chunk.keys[d / 2 * chunk.key_stride + j], d % 2 == 1); },
      [&](int j, int d) { return nibble(chunk.values[j * half + d % half], d >= half); });
}

void transpose16_reference(const float* from, int from_stride, int columns, float* to,
                           int to_stride) {
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < kLanes; ++r) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

}  // namespace

const AttentionKernels kAttentionReference = {split_reference, quantize_reference,
                                              dequantize8_reference, dequantize4_reference,
                                              transpose16_reference};

float exp_nonpositive(float x) {
  using namespace exp_constants;
  if (x < kLowest) return 0.0F;
  const float shifted = std::fma(x, kLog2E, kRound);
  const float n = shifted - kRound;
  float r = std::fma(n, -kLn2High, x);
  r = std::fma(n, -kLn2Low, r);
  float y = kQ4;
  y = std::fma(y, r, kQ3);
  y = std::fma(y, r, kQ2);
  y = std::fma(y, r, kQ1);
  y = std::fma(y, r, kQ0);
  y = std::fma(y, r, 1.0F);
  y = std::fma(y, r, 1.0F);
  // The low bits of `shifted` are n: moved to the exponent they multiply 1.0 by 2^n.
  const uint32_t bits = (std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000U;
  return y * std::bit_cast<float>(bits);
}

void merge_split(float max, float sum, const float* out, int head_dim, float* total_max,
                 float* total_sum, float* total_out) {
  if (*total_max == kMinusInfinity) {
    *total_max = max;
    *total_sum = sum;
    std::copy(out, out + head_dim, total_out);
    return;
  }
  const float both = max > *total_max ? max : *total_max;
  const float old_share = exp_nonpositive(*total_max - both);
  const float new_share = exp_nonpositive(max - both);
  *total_max = both;
  *total_sum = *total_sum * old_share + sum * new_share;
  for (int d = 0; d < head_dim; ++d) total_out[d] = total_out[d] * old_share + out[d] * new_share;
}

}  // namespace turbomind::cpu
