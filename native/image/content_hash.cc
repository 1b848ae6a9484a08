// The hash of native/image/content_hash.h but for its vector kernels: units, polynomial, keys. Pure
// functions but for the process's key; any thread.
#include "image/content_hash.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <random>

namespace turbomind::image {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read as little-endian");

__extension__ using Wide = unsigned __int128;

constexpr Wide kPrime = (static_cast<Wide>(1) << 127) - 1;

// Sum of two numbers below the prime.
Wide add(Wide a, Wide b) {
  const Wide sum = a + b;
  return sum >= kPrime ? sum - kPrime : sum;
}

// Any 128 bits.
Wide reduce(Wide a) {
  const Wide low = a & kPrime;
  return add(a >> 127, low == kPrime ? 0 : low);
}

// Product of two numbers below the prime; 2^127 counts as 1.
Wide multiply(Wide a, Wide b) {
  const auto low = [](Wide x) { return static_cast<uint64_t>(x); };
  const auto high = [](Wide x) { return static_cast<uint64_t>(x >> 64); };
  const Wide bottom = static_cast<Wide>(low(a)) * low(b);
  const Wide middle = static_cast<Wide>(low(a)) * high(b) + static_cast<Wide>(high(a)) * low(b);
  const Wide top = static_cast<Wide>(high(a)) * high(b);  // below 2^126, times 2^128
  const Wide carried = middle >> 63;                      // of middle * 2^64, above bit 127
  const Wide kept = static_cast<Wide>(low(middle) & (UINT64_MAX >> 1)) << 64;
  return add(add(reduce(bottom), reduce(2 * top)), add(carried, kept));
}

bool always() { return true; }

void sum_scalar(const uint8_t* data, size_t groups, const uint32_t* key,
                uint64_t (&words)[kHashWords]) {
  constexpr size_t kStep = kHashGroup / sizeof(uint32_t);
  for (uint64_t& word : words) word = 0;
  for (size_t g = 0; g < groups; ++g, key += kStep) {
    uint32_t message[kStep];
    std::memcpy(message, data + g * kHashGroup, kHashGroup);
    for (size_t p = 0; p < kHashWords; ++p) {
      const uint32_t* own = key + p * kStep;
      for (size_t i = 0; i < kStep; i += 2) {
        const uint32_t x = message[i] + own[i];
        const uint32_t y = message[i + 1] + own[i + 1];
        words[p] += static_cast<uint64_t>(x) * y;
      }
    }
  }
}

const HashKernel& best_kernel() {
  static const HashKernel& best = *[] {
    const auto& table = hash_kernel_table();
    return *std::find_if(table.begin(), table.end(), [](auto* row) { return row->supported(); });
  }();
  return best;
}

}  // namespace

const HashKernel kScalarHash = {"scalar", always, sum_scalar};

const std::vector<const HashKernel*>& hash_kernel_table() {
  static const std::vector<const HashKernel*> table = {
#if defined(__x86_64__)
    &kAvx2Hash,
#endif
    &kScalarHash,
  };
  return table;
}

HashKey random_hash_key() {
  static_assert(sizeof(std::random_device::result_type) == sizeof(uint32_t));
  std::random_device source;
  HashKey key;
  for (uint32_t& word : key.sums) word = source();
  for (uint64_t& word : key.point) word = static_cast<uint64_t>(source()) << 32 | source();
  key.point[1] >>= 2;
  return key;
}

const HashKey& process_hash_key() {
  static const HashKey key = random_hash_key();
  return key;
}

ContentHash content_hash_with(const HashKernel& kernel, const void* data, size_t bytes,
                              const ContentHash& previous, const HashKey& key) {
  const Wide point = static_cast<Wide>(key.point[1]) << 64 | key.point[0];
  Wide value = reduce(static_cast<Wide>(previous.words[1]) << 64 | previous.words[0]);
  const auto append = [&](Wide coefficient) { value = add(multiply(value, point), coefficient); };
  const auto append_unit = [&](const uint8_t* unit, size_t groups) {
    uint64_t words[kHashWords];
    kernel.sum(unit, groups, key.sums, words);
    // 64 + 21, 64 + 22 and 64 + 21 bits.
    append(static_cast<Wide>(words[3] & 0x1FFFFF) << 64 | words[0]);
    append(static_cast<Wide>(words[3] >> 21 & 0x3FFFFF) << 64 | words[1]);
    append(static_cast<Wide>(words[3] >> 43) << 64 | words[2]);
  };
  const uint8_t* cursor = static_cast<const uint8_t*>(data);
  size_t left = bytes;
  for (; left >= kHashUnit; left -= kHashUnit, cursor += kHashUnit) {
    append_unit(cursor, kHashUnit / kHashGroup);
  }
  if (left > 0) {
    alignas(64) uint8_t last[kHashUnit];
    const size_t groups = (left + kHashGroup - 1) / kHashGroup;
    std::memcpy(last, cursor, left);
    std::memset(last + left, 0, groups * kHashGroup - left);
    append_unit(last, groups);
  }
  append(static_cast<Wide>(bytes) + 1);
  return {{static_cast<uint64_t>(value), static_cast<uint64_t>(value >> 64)}};
}

ContentHash content_hash(const void* data, size_t bytes, const ContentHash& previous,
                         const HashKey& key) {
  return content_hash_with(best_kernel(), data, bytes, previous, key);
}

}  // namespace turbomind::image
