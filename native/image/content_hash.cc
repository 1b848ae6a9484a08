#include "image/content_hash.h"

#include <bit>
#include <cstring>

namespace turbomind::image {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read as little-endian");

__extension__ using Product = unsigned __int128;

// Fraction digits of pi, 64 bits each.
constexpr uint64_t kPi[9] = {0x243F6A8885A308D3ULL, 0x13198A2E03707344ULL, 0xA4093822299F31D0ULL,
                             0x082EFA98EC4E6C89ULL, 0x452821E638D01377ULL, 0xBE5466CF34E90C6CULL,
                             0xC0AC29B7C97C50DDULL, 0x3F84D5B5B5470917ULL, 0x9216D5D98979FB1BULL};
constexpr uint64_t kMix = kPi[8];
constexpr size_t kLanes = 4;
constexpr size_t kStripe = 64;

struct Lane {
  uint64_t lo, hi;
  void absorb(uint64_t a, uint64_t b) {
    const Product product = static_cast<Product>(lo ^ a) * (hi ^ b ^ kMix);
    const uint64_t before = lo;
    lo = static_cast<uint64_t>(product) + std::rotl(b, 29) + hi;
    hi = (static_cast<uint64_t>(product >> 64) + std::rotl(a, 31)) ^ before;
  }
};

void absorb_stripe(Lane (&lanes)[kLanes], const uint8_t* stripe) {
  for (size_t i = 0; i < kLanes; ++i) {
    uint64_t words[2];
    std::memcpy(words, stripe + 16 * i, sizeof(words));
    lanes[i].absorb(words[0], words[1]);
  }
}

}  // namespace

ContentHash content_hash(const void* data, size_t bytes) {
  Lane lanes[kLanes];
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = {kPi[2 * i], kPi[2 * i + 1]};
  const uint8_t* cursor = static_cast<const uint8_t*>(data);
  size_t left = bytes;
  for (; left >= kStripe; left -= kStripe, cursor += kStripe) absorb_stripe(lanes, cursor);
  if (left > 0) {
    uint8_t stripe[kStripe] = {};
    std::memcpy(stripe, cursor, left);
    absorb_stripe(lanes, stripe);
  }
  Lane state{kPi[0] ^ bytes, kPi[1] + bytes};
  for (const Lane& lane : lanes) state.absorb(lane.lo, lane.hi);
  state.absorb(bytes, kMix);
  state.absorb(kMix, bytes);
  return {{state.lo, state.hi}};
}

}  // namespace turbomind::image
