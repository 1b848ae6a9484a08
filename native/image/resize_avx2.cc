// AVX2 row kernels. A 22-bit weight w is split into w = high * 4096 + low, both of which fit 16
// bits, so that pmaddwd multiplies two taps at once without loss: sum = (sums of high << 12) + sums
// of low. Sums may wrap on the way; the final sum fits 32 bits, so the result is exact.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "image/resize_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

namespace turbomind::image {
namespace {

constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);

// [low 0..3][high 0..3], 16 bits each.
void encode(const int32_t* weights, uint8_t* out) {
  int16_t halves[8];
  for (int t = 0; t < 4; ++t) {
    const int32_t low = ((weights[t] + 2048) & 4095) - 2048;
    halves[t] = static_cast<int16_t>(low);
    halves[4 + t] = static_cast<int16_t>((weights[t] - low) >> 12);
  }
  std::memcpy(out, halves, sizeof(halves));
}

PackedWeights pack(const Coefficients& coefficients, Axis axis, int /*channels*/) {
  return pack_weights(coefficients, axis, encode);
}

bool supported() { return __builtin_cpu_supports("avx2"); }

// Byte shuffle of one 128-bit lane holding four pixels: 32-bit element c becomes the 16-bit pair
// (tap `first`, tap `first` + 1) of channel c; element 3 becomes zero.
__m256i pair_shuffle(int channels, int first) {
  alignas(16) int8_t bytes[16];
  std::fill(bytes, bytes + 16, static_cast<int8_t>(-128));
  for (int channel = 0; channel < 3; ++channel) {
    for (int t = 0; t < 2; ++t) {
      bytes[4 * channel + 2 * t] =
          static_cast<int8_t>((first + t) * channels + (channels == 1 ? 0 : channel));
    }
  }
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

__m256i finish(__m256i high, __m256i low) {
  const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high, 12), low);
  return _mm256_srai_epi32(sum, kPrecisionBits);
}

template <int Rows>
void horizontal_rows(const HorizontalArgs& args, int first_row) {
  const Coefficients& c = *args.coefficients;
  const __m256i shuffle01 = pair_shuffle(args.channels, 0);
  const __m256i shuffle23 = pair_shuffle(args.channels, 2);
  const __m128i compact =
      _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -128, -128, -128, -128);
  const size_t step_bytes = static_cast<size_t>(kTapsPerStep) * args.channels;
  const int groups = static_cast<int>(c.starts.size()) / kOutputsPerGroup;
  const uint8_t* weights = args.weights->bytes.data();
  for (int group = 0; group < groups; ++group) {
    __m256i pixels[2][Rows];  // [pair of outputs][row], RGB0 of two outputs, 32 bits each
    for (int pair = 0; pair < 2; ++pair) {
      const int* starts = &c.starts[static_cast<size_t>(group) * 4 + 2 * pair];
      size_t left = static_cast<size_t>(starts[0]) * args.channels;
      size_t right = static_cast<size_t>(starts[1]) * args.channels;
      __m256i low[Rows], high[Rows];
      for (int r = 0; r < Rows; ++r) {
        low[r] = _mm256_set1_epi32(kHalf);
        high[r] = _mm256_setzero_si256();
      }
      const uint8_t* weight = weights + static_cast<size_t>(group) * c.steps * 64 + 32 * pair;
      for (int step = 0; step < c.steps; ++step, weight += 64) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
        const __m256i low01 = _mm256_shuffle_epi32(w, 0x00);
        const __m256i low23 = _mm256_shuffle_epi32(w, 0x55);
        const __m256i high01 = _mm256_shuffle_epi32(w, 0xAA);
        const __m256i high23 = _mm256_shuffle_epi32(w, 0xFF);
        for (int r = 0; r < Rows; ++r) {
          const uint8_t* in = args.in[first_row + r];
          const __m256i taps = _mm256_inserti128_si256(
              _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + left))),
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + right)), 1);
          const __m256i taps01 = _mm256_shuffle_epi8(taps, shuffle01);
          const __m256i taps23 = _mm256_shuffle_epi8(taps, shuffle23);
          low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(taps01, low01));
          low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(taps23, low23));
          high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(taps01, high01));
          high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(taps23, high23));
        }
        left += step_bytes;
        right += step_bytes;
      }
      for (int r = 0; r < Rows; ++r) pixels[pair][r] = finish(high[r], low[r]);
    }
    for (int r = 0; r < Rows; ++r) {
      // lane 0: outputs 0 and 2, lane 1: outputs 1 and 3
      const __m256i words = _mm256_packs_epi32(pixels[0][r], pixels[1][r]);
      const __m256i bytes = _mm256_packus_epi16(words, words);
      const __m128i ordered =
          _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(args.out[first_row + r] + static_cast<size_t>(group) * 12),
          _mm_shuffle_epi8(ordered, compact));
    }
  }
}

void horizontal(const HorizontalArgs& args) {
  int row = 0;
  for (; row + 2 <= args.num_rows; row += 2) horizontal_rows<2>(args, row);
  if (row < args.num_rows) horizontal_rows<1>(args, row);
}

// 32 output bytes at column `x`.
void vertical_block(const VerticalArgs& args, int x) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    low[i] = _mm256_set1_epi32(kHalf);
    high[i] = zero;
  }
  const uint8_t* weight = args.weights;
  const uint8_t* const* in = args.in;
  for (int pair = 0; pair < 2 * args.steps; ++pair, in += 2) {
    int32_t low_pair, high_pair;
    const uint8_t* at = weight + static_cast<size_t>(pair / 2) * 16 + (pair % 2) * 4;
    std::memcpy(&low_pair, at, 4);
    std::memcpy(&high_pair, at + 8, 4);
    const __m256i w_low = _mm256_set1_epi32(low_pair);
    const __m256i w_high = _mm256_set1_epi32(high_pair);
    const __m256i row0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in[0] + x));
    const __m256i row1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in[1] + x));
    const __m256i front = _mm256_unpacklo_epi8(row0, row1);
    const __m256i back = _mm256_unpackhi_epi8(row0, row1);
    const __m256i taps[4] = {_mm256_unpacklo_epi8(front, zero), _mm256_unpackhi_epi8(front, zero),
                             _mm256_unpacklo_epi8(back, zero), _mm256_unpackhi_epi8(back, zero)};
    for (int i = 0; i < 4; ++i) {
      low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(taps[i], w_low));
      high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(taps[i], w_high));
    }
  }
  const __m256i front = _mm256_packs_epi32(finish(high[0], low[0]), finish(high[1], low[1]));
  const __m256i back = _mm256_packs_epi32(finish(high[2], low[2]), finish(high[3], low[3]));
  // The packs undo the lane order of the unpacks.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.out + x), _mm256_packus_epi16(front, back));
}

// A row too narrow for one block.
void vertical_narrow(const VerticalArgs& args) {
  for (int x = 0; x < args.bytes; ++x) {
    int32_t sum = kHalf;
    for (int tap = 0; tap < args.steps * kTapsPerStep; ++tap) {
      int16_t low, high;
      const uint8_t* at = args.weights + static_cast<size_t>(tap / 4) * 16 + (tap % 4) * 2;
      std::memcpy(&low, at, 2);
      std::memcpy(&high, at + 8, 2);
      sum += (high * 4096 + low) * args.in[tap][x];
    }
    args.out[x] = static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
  }
}

void vertical(const VerticalArgs& args) {
  if (args.bytes < 32) return vertical_narrow(args);
  int x = 0;
  for (; x + 32 <= args.bytes; x += 32) vertical_block(args, x);
  if (x < args.bytes) vertical_block(args, args.bytes - 32);  // overlaps the block before
}

}  // namespace

const ResizeKernels kAvx2Kernels = {"avx2", supported, pack, horizontal, vertical};

}  // namespace turbomind::image

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
