#include "image/coefficients.h"

#include <algorithm>
#include <cmath>

#include "base/types.h"

namespace turbomind::image {
namespace {

// Catmull-Rom cubic, a = -0.5. The order of operations is part of the contract: weights must equal
// Pillow's to the last bit of the double before they are rounded.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

int32_t to_fixed(double weight) {
  constexpr double one = 1 << kPrecisionBits;
  return static_cast<int32_t>(weight < 0 ? -0.5 + weight * one : 0.5 + weight * one);
}

}  // namespace

Coefficients bicubic_coefficients(int in_size, int out_size) {
  const double scale = static_cast<double>(in_size) / out_size;
  const double filter_scale = std::max(scale, 1.0);  // shrinking widens the filter
  const double support = 2.0 * filter_scale;
  const double inverse = 1.0 / filter_scale;
  const int max_taps = static_cast<int>(std::ceil(support)) * 2 + 1;

  Coefficients result;
  const int padded = round_up(out_size, kOutputsPerGroup);
  result.outputs = out_size;
  result.starts.assign(padded, 0);
  result.counts.assign(padded, 0);
  for (int i = 0; i < out_size; ++i) {
    const double center = (i + 0.5) * scale;
    const int begin = std::max(static_cast<int>(center - support + 0.5), 0);
    const int end = std::min(static_cast<int>(center + support + 0.5), in_size);
    result.starts[i] = begin;
    result.counts[i] = end - begin;
    result.max_count = std::max(result.max_count, end - begin);
  }
  result.steps = ceil_div(result.max_count, kTapsPerStep);
  result.taps = result.steps * kTapsPerStep;
  result.weights.assign(static_cast<size_t>(padded) * result.taps, 0);

  std::vector<double> row(max_taps);
  for (int i = 0; i < out_size; ++i) {
    const double center = (i + 0.5) * scale;
    const int begin = result.starts[i];
    const int count = result.counts[i];
    double sum = 0.0;
    for (int t = 0; t < count; ++t) {
      row[t] = bicubic((t + begin - center + 0.5) * inverse);
      sum += row[t];
    }
    int32_t* weights = &result.weights[static_cast<size_t>(i) * result.taps];
    for (int t = 0; t < count; ++t) weights[t] = to_fixed(sum != 0.0 ? row[t] / sum : row[t]);
  }
  for (int i = out_size; i < padded; ++i) result.starts[i] = result.starts[out_size - 1];
  return result;
}

}  // namespace turbomind::image
