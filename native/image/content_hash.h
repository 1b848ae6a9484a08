// A 128-bit keyed hash that names pictures and tiles in caches: two of them that differ have the same
// hash with a probability below 2^-100, whoever chose them, because the key is drawn at random for each
// process and nobody outside knows it. Not for storing: the next process names everything anew.
//
// A universal hash rather than a cryptographic one, since it is several times faster: memory's speed on one
// core. Units of 4096 bytes, the last one filled up with zeros to a multiple of 64, become four words each:
//   w[p] = sum over pairs (x, y) of 32-bit words of (x + k) * (y + k'), 64 bits; p = 0..3
// with the key k moved on by 64 bytes from p to p + 1 (NH with Toeplitz keys: Black, Halevi, Krawczyk,
// Krovetz, Rogaway, "UMAC", 1999; 2^-32 for each p). The units' words are the coefficients of a polynomial
// over the integers modulo 2^127 - 1, taken at a secret point: three coefficients a unit, then 1 + length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace turbomind::image {

struct ContentHash {
  uint64_t words[2] = {0, 0};
  bool operator==(const ContentHash&) const = default;
};

constexpr size_t kHashUnit = 4096;  // bytes
constexpr size_t kHashGroup = 64;   // bytes: what units are filled up to, and the key's move
constexpr size_t kHashWords = 4;    // of a unit

struct HashKey {
  alignas(64) uint32_t sums[(kHashUnit + (kHashWords - 1) * kHashGroup) / sizeof(uint32_t)];
  uint64_t point[2];  // low, high; below 2^126
};
HashKey random_hash_key();
const HashKey& process_hash_key();  // drawn at the first call

// The hash of `previous` and then these bytes. The same bytes cut into other pieces are another input, so
// what is hashed piece by piece must always be cut alike.
ContentHash content_hash(const void* data, size_t bytes, const ContentHash& previous = {},
                         const HashKey& key = process_hash_key());

// The inner sums, once for each instruction set; all give the same words.
struct HashKernel {
  const char* name;
  bool (*supported)();
  // `groups` of 64 bytes each, at most a unit.
  void (*sum)(const uint8_t* data, size_t groups, const uint32_t* key,
              uint64_t (&words)[kHashWords]);
};
extern const HashKernel kScalarHash;                        // the reference
extern const HashKernel kAvx2Hash;                          // x86-64 only
const std::vector<const HashKernel*>& hash_kernel_table();  // fastest first, scalar last
ContentHash content_hash_with(const HashKernel& kernel, const void* data, size_t bytes,
                              const ContentHash& previous, const HashKey& key);

}  // namespace turbomind::image
