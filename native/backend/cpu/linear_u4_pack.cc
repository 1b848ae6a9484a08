// AWQ arrays to packed blocks, one quantisation group of all columns at a time: a group's qweight
// rows are one run of the file, so pages are read in order, once, and dropped after. Runs at load
// on the backend's threads.
#include "backend/cpu/linear_u4_pack.h"

#include <cstring>

#include "backend/cpu/kernels/float_formats.h"
#include "backend/cpu/linear_u4.h"
#include "base/error.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace turbomind::cpu {
namespace {

long long ll(int64_t value) { return static_cast<long long>(value); }

void check_view(const LinearSource& source, const char* what, const ConstTensorView& view,
                int64_t rows, int64_t columns) {
  if (view.data != nullptr && view.rank == 2 && view.shape[0] == rows && view.shape[1] == columns)
    return;
  throw Error(ErrorCode::tensor_mismatch,
              format("%s: %s is [%lld, %lld] (rank %d), expected [%lld, %lld]", source.name.c_str(),
                     what, ll(view.dim(0)), ll(view.dim(1)), view.rank, ll(rows), ll(columns)));
}

void check_type(const LinearSource& source, const char* what, bool ok, DType dtype,
                const char* expected) {
  if (ok) return;
  throw Error(ErrorCode::tensor_mismatch,
              format("%s: %s has type %s, expected %s", source.name.c_str(), what,
                     std::string(to_string(dtype)).c_str(), expected));
}

bool is_float(DType dtype) {
  return dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32;
}

float read_scale(const ConstTensorView& view, int64_t at) {
  if (view.dtype == DType::f16) return f16_to_f32(view.as<uint16_t>()[at]);
  if (view.dtype == DType::bf16) return bf16_to_f32(view.as<uint16_t>()[at]);
  return view.as<float>()[at];
}

// Eight neighbouring packed columns always come from one AWQ word: parts have N % 8 == 0.
struct Octet {
  int part = -1;     // -1: padding
  int64_t word = 0;  // word of the row
};

// Column i of a word lies at bit kShift[i].
constexpr int kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};

uint8_t nibble(uint32_t word, int column) { return (word >> kShift[column]) & 15U; }

// Four rows of k of 32 columns (words [k][octet]) to one 64-byte line.
#if defined(__SSE2__)
// Bytes of a row: (word pair 0) low nibbles hold columns 0 4 1 5 of each word, high nibbles 2 6 3
// 7.
inline __m128i row_bytes(__m128i words) {
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(words, mask);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(words, 4), mask);
  // Columns n (words 0, 1) in the low nibble, columns n + 16 (words 2, 3) in the high one.
  const __m128i a = _mm_or_si128(low, _mm_slli_epi16(_mm_srli_si128(low, 8), 4));
  const __m128i b = _mm_or_si128(high, _mm_slli_epi16(_mm_srli_si128(high, 8), 4));
  // a = 0 4 1 5 | 8 12 9 13, b = 2 6 3 7 | 10 14 11 15. Interleaving 16-bit pairs: a0b0 a1b1 …
  const __m128i pairs = _mm_unpacklo_epi16(a, b);  // 0 4 2 6 1 5 3 7 | 8 12 10 14 9 13 11 15
  return pairs;
}

inline void write_line(const uint32_t (*words)[4], uint8_t* line) {
  __m128i rows[4];
  for (int i = 0; i < 4; ++i) {
    rows[i] = row_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words[i])));
  }
  const __m128i lo01 = _mm_unpacklo_epi8(rows[0], rows[1]),
                hi01 = _mm_unpackhi_epi8(rows[0], rows[1]);
  const __m128i lo23 = _mm_unpacklo_epi8(rows[2], rows[3]),
                hi23 = _mm_unpackhi_epi8(rows[2], rows[3]);
  // Words of four k each, columns in the order 0 4 2 6 | 1 5 3 7, then the same + 8.
  const __m128i q[4] = {_mm_unpacklo_epi16(lo01, lo23), _mm_unpackhi_epi16(lo01, lo23),
                        _mm_unpacklo_epi16(hi01, hi23), _mm_unpackhi_epi16(hi01, hi23)};
  __m128i* out = reinterpret_cast<__m128i*>(line);
  for (int half = 0; half < 2; ++half) {
    const __m128i even = q[2 * half], odd = q[2 * half + 1];             // 0 4 2 6, 1 5 3 7
    const __m128i low = _mm_unpacklo_epi32(even, odd);                   // 0 1 4 5
    const __m128i high = _mm_unpackhi_epi32(even, odd);                  // 2 3 6 7
    _mm_store_si128(out + 2 * half, _mm_unpacklo_epi64(low, high));      // 0 1 2 3
    _mm_store_si128(out + 2 * half + 1, _mm_unpackhi_epi64(low, high));  // 4 5 6 7
  }
}
#else
inline void write_line(const uint32_t (*words)[4], uint8_t* line) {
  for (int n = 0; n < 16; ++n) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t low = nibble(words[i][n / 8], n % 8);
      const uint8_t high = nibble(words[i][2 + n / 8], n % 8);
      line[4 * n + i] = static_cast<uint8_t>(low | (high << 4));
    }
  }
}
#endif

class Packer {
 public:
  Packer(const LinearSource& source, const U4Shape& shape, uint8_t* out)
      : source_(source), shape_(shape), out_(out), octets_(packed_blocks(source) * 4) {
    for (size_t i = 0; i < octets_.size(); ++i) {
      const SourceColumn first = source_column(source, static_cast<int64_t>(i) * 8);
      if (first.part >= 0) octets_[i] = {first.part, first.column / 8};
    }
  }

  void pack_group(int64_t g) const {
    const int64_t blocks = static_cast<int64_t>(octets_.size()) / 4;
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* block = out_ + b * shape_.block_bytes;
      pack_lines(g, &octets_[b * 4], block + shape_.nibbles_offset + g * shape_.group * 16);
      for (int i = 0; i < 4; ++i) pack_scales(g, octets_[b * 4 + i], i * 8, block);
    }
  }

 private:
  void pack_lines(int64_t g, const Octet* octets, uint8_t* lines) const {
    static constexpr uint32_t kNothing = 0;
    const uint32_t* at[4];
    int64_t stride[4];
    for (int i = 0; i < 4; ++i) {
      at[i] = &kNothing;
      stride[i] = 0;
      if (octets[i].part < 0) continue;
      const ConstTensorView& q = source_.parts[octets[i].part].qweight;
      stride[i] = q.shape[1];
      at[i] = q.as<uint32_t>() + g * shape_.group * stride[i] + octets[i].word;
    }
    for (int k = 0; k < shape_.group; k += 4, lines += 64) {
      alignas(16) uint32_t words[4][4];
      for (int row = 0; row < 4; ++row) {
        for (int i = 0; i < 4; ++i) words[row][i] = at[i][(k + row) * stride[i]];
      }
      write_line(words, lines);
    }
  }

  void pack_scales(int64_t g, const Octet& octet, int begin, uint8_t* block) const {
    if (octet.part < 0) return;  // memory is zeroed: scale 0, zero point 0
    const LinearPart& part = source_.parts[octet.part];
    const uint32_t zeros = part.qzeros.as<uint32_t>()[g * part.qzeros.shape[1] + octet.word];
    for (int i = 0; i < 8; ++i) {
      const int64_t at = g * kBlockColumns + begin + i;
      const int64_t from = g * part.out_features + octet.word * 8 + i;
      block[shape_.zeros_offset + at] = nibble(zeros, i);
      if (shape_.scale_type == ScaleType::f32) {
        reinterpret_cast<float*>(block)[at] = read_scale(part.scales, from);
      } else {
        reinterpret_cast<uint16_t*>(block)[at] = part.scales.as<uint16_t>()[from];
      }
    }
  }

  const LinearSource& source_;
  const U4Shape& shape_;
  uint8_t* out_;
  std::vector<Octet> octets_;
};

std::vector<std::pair<const void*, size_t>> source_ranges(const LinearSource& source) {
  std::vector<std::pair<const void*, size_t>> ranges;
  for (const LinearPart& part : source.parts) {
    ranges.emplace_back(part.qweight.data, part.qweight.bytes());
    ranges.emplace_back(part.scales.data, part.scales.bytes());
    ranges.emplace_back(part.qzeros.data, part.qzeros.bytes());
  }
  return ranges;
}

// The rows of group g of every part's qweight.
template <class Action>
void each_slab(const LinearSource& source, int64_t g, Action&& action) {
  for (const LinearPart& part : source.parts) {
    const size_t bytes = static_cast<size_t>(source.group_size * part.qweight.shape[1]) * 4;
    action(static_cast<const uint8_t*>(part.qweight.data) + static_cast<size_t>(g) * bytes, bytes);
  }
}

}  // namespace

void check_u4_source(const LinearSource& source) {
  const int group = source.group_size;
  const int64_t k = source.in_features;
  if (group != 32 && group != 64 && group != 128) {
    throw Error(
        ErrorCode::unsupported_quantization,
        format("%s: awq group_size %d; expected 32, 64 or 128", source.name.c_str(), group));
  }
  if (k <= 0 || k % group != 0) {
    throw Error(ErrorCode::tensor_mismatch, format("%s: awq group_size %d does not divide K = %lld",
                                                   source.name.c_str(), group, ll(k)));
  }
  for (const LinearPart& part : source.parts) {
    const int64_t n = part.out_features;
    if (n <= 0 || n % 8 != 0) {
      throw Error(ErrorCode::tensor_mismatch,
                  format("%s: awq needs output features in eights, got N = %lld",
                         source.name.c_str(), ll(n)));
    }
    check_view(source, "qweight", part.qweight, k, n / 8);
    check_view(source, "qzeros", part.qzeros, k / group, n / 8);
    check_view(source, "scales", part.scales, k / group, n);
    check_type(source, "qweight", part.qweight.dtype == DType::i32, part.qweight.dtype, "i32");
    check_type(source, "qzeros", part.qzeros.dtype == DType::i32, part.qzeros.dtype, "i32");
    check_type(source, "scales", is_float(part.scales.dtype), part.scales.dtype,
               "f16, bf16 or f32");
  }
}

U4Shape u4_shape(const LinearSource& source) {
  U4Shape shape;
  shape.k = source.in_features;
  shape.group = source.group_size;
  shape.step = std::min(shape.group, 64);
  shape.groups = shape.k / shape.group;
  const DType type = source.parts[0].scales.dtype;
  bool same = true;
  for (const LinearPart& part : source.parts) same = same && part.scales.dtype == type;
  shape.scale_type = !same || type == DType::f32 ? ScaleType::f32
                     : type == DType::f16        ? ScaleType::f16
                                                 : ScaleType::bf16;
  const size_t scale_bytes = shape.scale_type == ScaleType::f32 ? 4 : 2;
  const size_t entries = static_cast<size_t>(shape.groups) * kBlockColumns;
  shape.zeros_offset = entries * scale_bytes;
  shape.nibbles_offset = round_up(shape.zeros_offset + entries, size_t{64});
  shape.block_bytes = shape.nibbles_offset + static_cast<size_t>(shape.k) * 16;
  return shape;
}

MappedMemory pack_u4(const LinearSource& source, const U4Shape& shape, ThreadPool& pool) {
  MappedMemory memory(static_cast<size_t>(packed_blocks(source)) * shape.block_bytes);
  const SourcePages pages(source_ranges(source));
  const Packer packer(source, shape, memory.data());
  pool.parallel_for(shape.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      each_slab(source, g, [&](const void* data, size_t bytes) { pages.will_read(data, bytes); });
      packer.pack_group(g);
      each_slab(source, g, [&](const void* data, size_t bytes) { pages.done_with(data, bytes); });
    }
  });
  // Pages shared by two slabs, and the small arrays.
  for (const auto& [data, bytes] : source_ranges(source)) pages.done_with(data, bytes);
  return memory;
}

}  // namespace turbomind::cpu
