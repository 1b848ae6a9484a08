// A 128-bit content hash: fast, fixed by this description, the same on every machine and release.
// Not cryptographic: it names pixels for caches, it does not authenticate them.
//
// Four lanes of two 64-bit words start at digits of pi. Each 64-byte stripe gives lane i the two
// little-endian words (a, b) at offset 16 i:
//   p = (lo ^ a) * (hi ^ b ^ kMix)        128-bit product
//   lo = low(p) + rotl(b, 29) + hi;  hi = high(p) + rotl(a, 31) ^ lo_before
// so that a zero factor loses no input. The last stripe is padded with zeros; the byte length joins
// in the end, when the lanes are folded in order and finished with two rounds of the same step.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turbomind::image {

struct ContentHash {
  uint64_t words[2] = {0, 0};
  bool operator==(const ContentHash&) const = default;
};

ContentHash content_hash(const void* data, size_t bytes);

}  // namespace turbomind::image
