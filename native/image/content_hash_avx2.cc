// The sums of native/image/content_hash.h eight words at a time. A pair of words is the two halves of a
// 64-bit lane, so that one multiplication makes four products.
#if defined(__x86_64__)

#include <immintrin.h>

#include "image/content_hash.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

namespace turbomind::image {
namespace {

bool supported() { return __builtin_cpu_supports("avx2"); }

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

__m256i products(__m256i message, __m256i key) {
  const __m256i sum = _mm256_add_epi32(message, key);
  return _mm256_mul_epu32(sum, _mm256_srli_epi64(sum, 32));
}

void sum(const uint8_t* data, size_t groups, const uint32_t* key, uint64_t (&words)[kHashWords]) {
  __m256i sums[kHashWords] = {};
  for (size_t g = 0; g < groups; ++g, data += kHashGroup) {
    const __m256i left = load(data);
    const __m256i right = load(data + 32);
    for (size_t p = 0; p < kHashWords; ++p) {
      const uint32_t* own = key + (g + p) * (kHashGroup / sizeof(uint32_t));
      sums[p] = _mm256_add_epi64(sums[p], products(left, load(own)));
      sums[p] = _mm256_add_epi64(sums[p], products(right, load(own + 8)));
    }
  }
  for (size_t p = 0; p < kHashWords; ++p) {
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[p]);
    words[p] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
}

}  // namespace

const HashKernel kAvx2Hash = {"avx2", supported, sum};

}  // namespace turbomind::image

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
