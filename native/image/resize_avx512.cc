// AVX-512 VNNI row kernels. A 22-bit weight w is split into three signed bytes,
// w = b2 * 65536 + b1 * 256 + b0, so that vpdpbusd multiplies four taps of unsigned pixels at once
// without loss. Sums may wrap on the way; the final sum fits 32 bits, so the result is exact.
// With VBMI one byte permute fetches four outputs' taps from one load; without, four loads do.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own intrinsics' deliberately undefined operands.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "image/resize_kernels.h"

namespace turbomind::image {
namespace {

constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);

// [b0 of four taps][b1][b2][zero]
void encode(const int32_t* weights, uint8_t* out) {
  int8_t digits[16] = {};
  for (int t = 0; t < 4; ++t) {
    int32_t rest = weights[t];
    for (int digit = 0; digit < 3; ++digit) {
      digits[4 * digit + t] = static_cast<int8_t>(rest & 0xFF);
      rest = (rest - digits[4 * digit + t]) >> 8;
    }
  }
  std::memcpy(out, digits, sizeof(digits));
}

PackedWeights pack(const Coefficients& coefficients, Axis axis, int /*channels*/) {
  return pack_weights(coefficients, axis, encode);
}

// Adds the byte gather of every group of four outputs: byte (lane l, channel c, tap t) comes from
// pixel starts[l] + t, counted from the group's first pixel. Left empty when a group spans more
// than one register, which happens when the image shrinks about sixfold or more.
PackedWeights pack_vbmi(const Coefficients& coefficients, Axis axis, int channels) {
  PackedWeights packed = pack(coefficients, axis, channels);
  if (axis == Axis::vertical) return packed;
  const size_t groups = coefficients.starts.size() / kOutputsPerGroup;
  std::vector<uint8_t> indices(groups * 64, 0);
  for (size_t group = 0; group < groups; ++group) {
    const int* starts = &coefficients.starts[group * kOutputsPerGroup];
    for (int lane = 0; lane < 4; ++lane) {
      for (int t = 0; t < kTapsPerStep; ++t) {
        for (int channel = 0; channel < 3; ++channel) {
          const int pixel = starts[lane] - starts[0] + t;
          const int byte = pixel * channels + (channels == 1 ? 0 : channel);
          if (byte > 63) return packed;
          indices[group * 64 + lane * 16 + channel * 4 + t] = static_cast<uint8_t>(byte);
        }
      }
    }
  }
  packed.indices = std::move(indices);
  return packed;
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

bool supported_vbmi() { return supported() && __builtin_cpu_supports("avx512vbmi"); }

}  // namespace
}  // namespace turbomind::image

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#endif

namespace turbomind::image {
namespace {

// Byte shuffle of a lane holding four pixels: 32-bit element c becomes channel c of the four taps.
__m512i tap_shuffle(int channels) {
  alignas(16) int8_t bytes[16];
  std::memset(bytes, -128, sizeof(bytes));
  for (int channel = 0; channel < 3; ++channel) {
    for (int t = 0; t < 4; ++t) {
      bytes[4 * channel + t] = static_cast<int8_t>(t * channels + (channels == 1 ? 0 : channel));
    }
  }
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// vpermb, the one VBMI instruction used. Written out so that the compiler may not use VBMI anywhere
// else in this file, whose code must also run on processors that have VNNI alone.
__m512i permute_bytes(__m512i index, __m512i bytes) {
  __m512i result;
  asm("vpermb %2, %1, %0" : "=v"(result) : "v"(index), "v"(bytes));
  return result;
}

__m128i load16(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

__m512i finish(__m512i b0, __m512i b1, __m512i b2) {
  const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(b2, 8), b1);
  return _mm512_srai_epi32(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), b0), kPrecisionBits);
}

// Four rows' RGB0 sums of four outputs [lane = output] → 12 bytes of each row.
void store_rows(const __m512i (&sums)[4], uint8_t* const* out, size_t offset) {
  const __m512i by_row = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i compact = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -128, -128, -128, -128));
  const __m512i words01 = _mm512_packs_epi32(sums[0], sums[1]);
  const __m512i words23 = _mm512_packs_epi32(sums[2], sums[3]);
  const __m512i bytes = _mm512_packus_epi16(words01, words23);  // lane = output, element = row
  const __m512i rows = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(by_row, bytes), compact);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out[0] + offset), _mm512_castsi512_si128(rows));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out[1] + offset), _mm512_extracti32x4_epi32(rows, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out[2] + offset), _mm512_extracti32x4_epi32(rows, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out[3] + offset), _mm512_extracti32x4_epi32(rows, 3));
}

// Always four rows: fewer are padded with repeated pointers by the caller.
template <bool Gather>
void horizontal_rows(const HorizontalArgs& args, const uint8_t* const* in, uint8_t* const* out) {
  const Coefficients& c = *args.coefficients;
  const __m512i shuffle = tap_shuffle(args.channels);
  const size_t step_bytes = static_cast<size_t>(kTapsPerStep) * args.channels;
  const size_t groups = c.starts.size() / kOutputsPerGroup;
  const uint8_t* weight = args.weights->bytes.data();
  const uint8_t* index = args.weights->indices.data();
  for (size_t group = 0; group < groups; ++group) {
    const int* starts = &c.starts[group * kOutputsPerGroup];
    size_t at[4];
    for (int lane = 0; lane < 4; ++lane) {
      at[lane] = static_cast<size_t>(starts[lane]) * args.channels;
    }
    const __m512i gather = Gather ? _mm512_loadu_si512(index + group * 64) : shuffle;
    __m512i b0[4], b1[4], b2[4];
    for (int r = 0; r < 4; ++r) {
      b0[r] = _mm512_set1_epi32(kHalf);
      b1[r] = b2[r] = _mm512_setzero_si512();
    }
    for (int step = 0; step < c.steps; ++step, weight += 64) {
      const __m512i w = _mm512_loadu_si512(weight);
      const __m512i w0 = _mm512_shuffle_epi32(w, static_cast<_MM_PERM_ENUM>(0x00));
      const __m512i w1 = _mm512_shuffle_epi32(w, static_cast<_MM_PERM_ENUM>(0x55));
      const __m512i w2 = _mm512_shuffle_epi32(w, static_cast<_MM_PERM_ENUM>(0xAA));
      for (int r = 0; r < 4; ++r) {
        __m512i taps;
        if constexpr (Gather) {
          taps = permute_bytes(gather, _mm512_loadu_si512(in[r] + at[0]));
        } else {
          taps = _mm512_castsi128_si512(load16(in[r] + at[0]));
          taps = _mm512_inserti32x4(taps, load16(in[r] + at[1]), 1);
          taps = _mm512_inserti32x4(taps, load16(in[r] + at[2]), 2);
          taps = _mm512_inserti32x4(taps, load16(in[r] + at[3]), 3);
          taps = _mm512_shuffle_epi8(taps, shuffle);
        }
        b0[r] = _mm512_dpbusd_epi32(b0[r], taps, w0);
        b1[r] = _mm512_dpbusd_epi32(b1[r], taps, w1);
        b2[r] = _mm512_dpbusd_epi32(b2[r], taps, w2);
      }
      for (size_t& offset : at) offset += step_bytes;
    }
    __m512i sums[4];
    for (int r = 0; r < 4; ++r) sums[r] = finish(b0[r], b1[r], b2[r]);
    store_rows(sums, out, group * 12);
  }
}

void horizontal(const HorizontalArgs& args) {
  // Repeated rows compute and store the same bytes again.
  const uint8_t* in[4];
  uint8_t* out[4];
  for (int r = 0; r < 4; ++r) {
    const int row = std::min(r, args.num_rows - 1);
    in[r] = args.in[row];
    out[r] = args.out[row];
  }
  if (args.weights->indices.empty()) {
    horizontal_rows<false>(args, in, out);
  } else {
    horizontal_rows<true>(args, in, out);
  }
}

// 64 output bytes, or those that `mask` names.
void vertical_block(const VerticalArgs& args, int x, __mmask64 mask) {
  __m512i b0[4], b1[4], b2[4];
  for (int i = 0; i < 4; ++i) {
    b0[i] = _mm512_set1_epi32(kHalf);
    b1[i] = b2[i] = _mm512_setzero_si512();
  }
  const uint8_t* weight = args.weights;
  const uint8_t* const* in = args.in;
  for (int step = 0; step < args.steps; ++step, in += 4, weight += 16) {
    int32_t digits[3];
    std::memcpy(digits, weight, sizeof(digits));
    const __m512i w0 = _mm512_set1_epi32(digits[0]);
    const __m512i w1 = _mm512_set1_epi32(digits[1]);
    const __m512i w2 = _mm512_set1_epi32(digits[2]);
    const __m512i row0 = _mm512_maskz_loadu_epi8(mask, in[0] + x);
    const __m512i row1 = _mm512_maskz_loadu_epi8(mask, in[1] + x);
    const __m512i row2 = _mm512_maskz_loadu_epi8(mask, in[2] + x);
    const __m512i row3 = _mm512_maskz_loadu_epi8(mask, in[3] + x);
    const __m512i front01 = _mm512_unpacklo_epi8(row0, row1);
    const __m512i back01 = _mm512_unpackhi_epi8(row0, row1);
    const __m512i front23 = _mm512_unpacklo_epi8(row2, row3);
    const __m512i back23 = _mm512_unpackhi_epi8(row2, row3);
    const __m512i taps[4] = {
        _mm512_unpacklo_epi16(front01, front23), _mm512_unpackhi_epi16(front01, front23),
        _mm512_unpacklo_epi16(back01, back23), _mm512_unpackhi_epi16(back01, back23)};
    for (int i = 0; i < 4; ++i) {
      b0[i] = _mm512_dpbusd_epi32(b0[i], taps[i], w0);
      b1[i] = _mm512_dpbusd_epi32(b1[i], taps[i], w1);
      b2[i] = _mm512_dpbusd_epi32(b2[i], taps[i], w2);
    }
  }
  const __m512i front =
      _mm512_packs_epi32(finish(b0[0], b1[0], b2[0]), finish(b0[1], b1[1], b2[1]));
  const __m512i back = _mm512_packs_epi32(finish(b0[2], b1[2], b2[2]), finish(b0[3], b1[3], b2[3]));
  // The packs undo the lane order of the unpacks.
  _mm512_mask_storeu_epi8(args.out + x, mask, _mm512_packus_epi16(front, back));
}

void vertical(const VerticalArgs& args) {
  int x = 0;
  for (; x + 64 <= args.bytes; x += 64) vertical_block(args, x, ~0ULL);
  if (x < args.bytes) vertical_block(args, x, (1ULL << (args.bytes - x)) - 1);
}

}  // namespace

// The row without VBMI never runs the gather: `pack` leaves no indices.
const ResizeKernels kAvx512Kernels = {"avx512", supported, pack, horizontal, vertical};
const ResizeKernels kAvx512VbmiKernels = {"avx512_vbmi", supported_vbmi, pack_vbmi, horizontal,
                                          vertical};

}  // namespace turbomind::image

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
