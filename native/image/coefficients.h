// The weights of Pillow's antialiased bicubic resize along one axis, in its 22-bit fixed point.
// Pure data, shared read-only by the preprocessing threads.
#pragma once

#include <cstdint>
#include <vector>

namespace turbomind::image {

constexpr int kPrecisionBits = 32 - 8 - 2;  // Pillow's PRECISION_BITS: 8-bit sums fit 32 bits
constexpr int kTapsPerStep = 4;             // taps are padded with zero weights to whole steps
constexpr int kOutputsPerGroup = 4;         // outputs are padded with zero weights to whole groups

// Output i is the sum over t < counts[i] of weights[i * taps + t] * in[starts[i] + t].
struct Coefficients {
  int outputs = 0;               // as asked for; the arrays hold round_up(outputs, 4) entries
  int steps = 0;                 // taps / 4
  int taps = 0;                  // padded, the same for all outputs
  std::vector<int> starts;       // first input of each output
  std::vector<int> counts;       // taps with a weight; starts + counts <= in
  std::vector<int32_t> weights;  // [outputs, taps], fixed point
  int max_count = 0;
};

Coefficients bicubic_coefficients(int in_size, int out_size);

}  // namespace turbomind::image
