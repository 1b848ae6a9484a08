// Layout of a KV tile: the keys or the values of one block (64 tokens) and one KV head, contiguous,
// so that one bulk copy moves it. 16-bit tiles lie in memory as the swizzled rows that ldmatrix and
// wgmma read from shared memory without bank conflicts; 8 and 4-bit tiles lie in the order in which
// a lane needs them as the A fragment of an m16n8k16 product (K: keys x dims; V: dims x keys), then
// 64 words of scale (low half) and zero (high half), f16, one a token. Dequantised integers are exact
// in f16, in which products with them are taken; scales and zeros are applied to scores and probabilities.
#pragma once

#include <type_traits>

#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/device/shared_memory.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {

// 16-bit rows of kWidth dims, kDim / kWidth chunks of 64 rows.
template <int kDim>
struct HalfTile {
  static constexpr int kWidth = kDim % 64 == 0 ? 64 : kDim % 32 == 0 ? 32 : 16;
  static constexpr int kRowBytes = kWidth * 2;
  static constexpr int kBytes = kBlockTokens * kDim * 2;
  // Byte of an 8-aligned dim. The swizzles are those of wgmma for rows of 128, 64 and 32 bytes.
  static __device__ __forceinline__ int offset(int token, int dim) {
    const int plain =
        dim / kWidth * (kBlockTokens * kRowBytes) + token * kRowBytes + dim % kWidth * 2;
    return plain ^ (((plain >> 7) & (kRowBytes / 16 - 1)) << 4);
  }
};

template <int kDim, int kBits>
struct PackedTile {
  static constexpr int kSteps = kDim / 16;
  static constexpr int kDataBytes = kBlockTokens * kDim * kBits / 8;
  static constexpr int kBytes = kDataBytes + kBlockTokens * 4;
  // K: k16 steps whose values of a lane and key lie together, at most 16 bytes.
  static constexpr int kMost = 32 / kBits;
  static constexpr int kGroup = kSteps % kMost == 0 ? kMost
                                : kSteps % 4 == 0   ? 4
                                : kSteps % 2 == 0   ? 2
                                                    : 1;
  static constexpr int kLaneBytes = kGroup * 4 * kBits / 8;
  static_assert(kLaneBytes <= 16);

  // The byte that holds dim 16 s + i of a key (8 bits), or dims 16 s + i (low) and 16 s + i + 8
  // (high, i < 8) (4 bits).
  static __device__ __forceinline__ int key_offset(int token, int s, int i) {
    const int lane = (s / kGroup * kBlockTokens + token) * 4 + i % 8 / 2;
    const int e = s % kGroup;
    if constexpr (kBits == 8) return lane * kLaneBytes + e * 4 + i % 2 + i / 8 * 2;
    return lane * kLaneBytes + (kGroup == 1 ? i % 2 : e / 2 * 4 + e % 2 + i % 2 * 2);
  }
  // The same of a value: dim 16 m + i.
  static __device__ __forceinline__ int value_offset(int token, int m, int i) {
    const int step = token / 16;
    const int c = token % 8 / 2;
    const int j =
        token % 2 + token % 16 / 8 * 2;  // which of the lane's keys 2c, 2c + 1, 2c + 8, 2c + 9
    const int lane = i % 8 * 4 + c;
    if constexpr (kBits == 8) {
      return m * 1024 + step / 2 * 512 + lane * 16 + step % 2 * 8 + i / 8 * 4 + j;
    }
    return m * 512 + lane * 16 + step * 4 + j / 2 + j % 2 * 2;
  }
};

template <int kDim, int kBits>
inline constexpr int kTileBytes = kBits == 16 ? HalfTile<kDim>::kBytes : PackedTile < kDim,
                     kBits == 16 ? 8 : kBits > ::kBytes;

// ---- integers → pairs of T -----------------------------------------------------------------------

// What products are taken in. Levels cost half as much in f16 as in bf16, whose 8 bits leave no room for an
// offset, and probabilities keep 11 bits. A bf16 query is exact in f16 from 2^-17 on and off by 2^-25 below;
// the scale of a key ends at f16's range as well.
template <class T, int kBits>
using ProductType = std::conditional_t<kBits == 16, T, __half>;

// Two values as f16 in one register; what lies beyond its range becomes its last value.
__device__ __forceinline__ uint32_t pack_finite_pair(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// A pair of T as a pair of products' operands.
template <class T, int kBits>
__device__ __forceinline__ uint32_t product_pair(uint32_t bits) {
  if constexpr (__is_same(T, ProductType<T, kBits>)) {
    return bits;
  } else {
    const float2 pair = unpack_pair<T>(bits);
    return pack_finite_pair(pair.x, pair.y);
  }
}
// Probabilities (times V's scale) as operands.
template <class T, int kBits>
__device__ __forceinline__ uint32_t pack_probabilities(float low, float high) {
  return kBits == 16 ? pack_pair<T>(low, high) : pack_finite_pair(low, high);
}

__device__ __forceinline__ uint32_t subtract_pair(uint32_t bits, uint32_t magic) {
  const __half2 value =
      __hsub2(reinterpret_cast<const __half2&>(bits), reinterpret_cast<const __half2&>(magic));
  return reinterpret_cast<const uint32_t&>(value);
}

// Levels come out centred, q - 2^(bits - 1), and the zero is that of the centre: rounding a
// probability then costs a share of V's spread and not of its offset.
template <int kBits>
inline constexpr int kCentre = 1 << (kBits - 1);

// Bytes 2 half and 2 half + 1 of a word.
__device__ __forceinline__ uint32_t bytes_to_pair(uint32_t word, int half) {
  return subtract_pair(__byte_perm(word, 0x64646464U, half == 0 ? 0x4140 : 0x4342),
                       0x64806480U);  // 1024 + 128
}

// (word & mask) | magic in one instruction; written in C it becomes two.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t masked_bits(uint32_t word, uint32_t magic) {
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(word), "n"(kMask), "r"(magic));
  return bits;
}

// Nibbles p and p + 4 of a word. Odd ones are taken where they lie, as sixteenths of 64.
__device__ __forceinline__ uint32_t nibbles_to_pair(uint32_t word, int p) {
  const uint32_t at = p < 2 ? word : word >> 8;
  if (p % 2 == 0) {
    return subtract_pair(masked_bits<0x000f000f>(at, 0x64006400U), 0x64086408U);  // 1024 + 8
  }
  return subtract_pair(masked_bits<0x00f000f0>(at, 0x54005400U), 0x54805480U);  // 64 + 8
}

// ---- fragments -----------------------------------------------------------------------------------

// Reads the K tile at a shared address as A fragments of 16 keys x 16 dims: registers (key g, dims
// 2c), (key g + 8, 2c), (g, 2c + 8), (g + 8, 2c + 8).
template <int kDim, int kBits>
struct KeyFragments {
  static constexpr int kGroup = kBits == 16 ? 1 : PackedTile < kDim,
                       kBits == 16 ? 8 : kBits > ::kGroup;
  static constexpr int kSteps = kDim / 16;

  // What a lane reads for kGroup steps of 16 keys: the fragment itself, or its packed values by rows g
  // and g + 8.
  struct Words {
    uint32_t row[2][4];
  };
  static __device__ __forceinline__ void load_words(Words& words, uint32_t tile, int key0,
                                                    int first, int lane) {
    if constexpr (kBits == 16) {
      ldmatrix_x4(words.row[0],
                  tile + HalfTile<kDim>::offset(key0 + (lane & 15), first * 16 + (lane >> 4) * 8));
    } else {
      using Tile = PackedTile<kDim, kBits>;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = key0 + lane / 4 + 8 * r;
        load_shared<Tile::kLaneBytes>(
            words.row[r],
            tile + ((first / kGroup * kBlockTokens + key) * 4 + lane % 4) * Tile::kLaneBytes);
      }
    }
  }
  // The fragment of step `e` of a group.
  static __device__ __forceinline__ void unpack(uint32_t (&a)[4], const Words& words, int e) {
    if constexpr (kBits == 16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = words.row[0][i];
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t(&row)[4] = words.row[r];
        if constexpr (kBits == 8) {
          a[r] = bytes_to_pair(row[e], 0);
          a[r + 2] = bytes_to_pair(row[e], 1);
        } else if constexpr (kGroup == 1) {
          const uint32_t spread = row[0] | (row[0] << 8);
          a[r] = nibbles_to_pair(spread, 0);
          a[r + 2] = nibbles_to_pair(spread, 1);
        } else {
          a[r] = nibbles_to_pair(row[e / 2], e % 2 * 2);
          a[r + 2] = nibbles_to_pair(row[e / 2], e % 2 * 2 + 1);
        }
      }
    }
  }
};

// Reads the V tile as A fragments of 16 dims x 16 tokens: registers (dim g, tokens 2c), (g + 8, 2c),
// (g, 2c + 8), (g + 8, 2c + 8). All four k16 steps of the tile for the dims from 16 m.
template <int kDim, int kBits>
struct ValueFragments {
  // What a lane reads: the fragments themselves, or their packed values.
  struct Words {
    uint32_t word[kBits / 4][4];
  };
  static __device__ __forceinline__ void load_words(Words& words, uint32_t tile, int m, int lane) {
    if constexpr (kBits == 16) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ldmatrix_x4_trans(words.word[step],
                          tile + HalfTile<kDim>::offset(step * 16 + (lane >> 4) * 8 + (lane & 7),
                                                        m * 16 + ((lane >> 3) & 1) * 8));
      }
    } else {
      constexpr int kRow = PackedTile<kDim, kBits>::kDataBytes / (kDim / 16);
#pragma unroll
      for (int i = 0; i < kBits / 4; ++i) {
        load_shared<16>(words.word[i], tile + m * kRow + i * 512 + lane * 16);
      }
    }
  }
  // The fragment of step `step`.
  static __device__ __forceinline__ void unpack(uint32_t (&a)[4], const Words& words, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBits == 16) {
        a[i] = words.word[step][i];
      } else if constexpr (kBits == 8) {
        a[i] = bytes_to_pair(words.word[step / 2][step % 2 * 2 + i % 2], i / 2);
      } else {
        a[i] = nibbles_to_pair(words.word[0][step], i);
      }
    }
  }
};

// Scale of a token of a packed tile, and the value of the centre level.
template <int kBits>
__device__ __forceinline__ float2 unpack_scale_zero(uint32_t word) {
  const float scale = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  const float zero = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  return {scale, fmaf(scale, static_cast<float>(kCentre<kBits>), zero)};
}

// Packed tile → the 16-bit tile of its integers in shared memory, by `warps` warps.
template <int kDim, int kBits>
__device__ __forceinline__ void unpack_keys(uint32_t half_tile, uint32_t packed, int warp,
                                            int warps, int lane) {
  using Fragments = KeyFragments<kDim, kBits>;
  for (int key0 = warp * 16; key0 < kBlockTokens; key0 += warps * 16) {
#pragma unroll
    for (int s = 0; s < kDim / 16; s += Fragments::kGroup) {
      typename Fragments::Words words;
      Fragments::load_words(words, packed, key0, s, lane);
#pragma unroll
      for (int e = 0; e < Fragments::kGroup; ++e) {
        uint32_t a[4];
        Fragments::unpack(a, words, e);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = key0 + lane / 4 + i % 2 * 8;
          const int dim = (s + e) * 16 + i / 2 * 8 + lane % 4 * 2;
          store_shared(half_tile + HalfTile<kDim>::offset(key, dim), a[i]);
        }
      }
    }
  }
}
template <int kDim, int kBits>
__device__ __forceinline__ void unpack_values(uint32_t half_tile, uint32_t packed, int warp,
                                              int warps, int lane) {
  for (int m = warp; m < kDim / 16; m += warps) {
    typename ValueFragments<kDim, kBits>::Words words;
    ValueFragments<kDim, kBits>::load_words(words, packed, m, lane);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      ValueFragments<kDim, kBits>::unpack(a, words, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = step * 16 + i / 2 * 8 + lane / 4;
        const int dim = m * 16 + i % 2 * 8 + lane % 4 * 2;
        store_shared(half_tile + HalfTile<kDim>::offset(token, dim), transpose_8x8(a[i]));
      }
    }
  }
}

}  // namespace turbomind::cuda
