// The reference row kernels, in plain loops, and the table of all kernels.
#include <algorithm>
#include <cstring>

#include "image/resize_kernels.h"

namespace turbomind::image {
namespace {

constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);

uint8_t to_byte(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
}

PackedWeights pack_scalar(const Coefficients& coefficients, Axis axis, int /*channels*/) {
  if (axis == Axis::horizontal) return {};  // the pass reads the coefficients themselves
  return pack_weights(coefficients, axis, [](const int32_t* weights, uint8_t* out) {
    std::memcpy(out, weights, kTapsPerStep * sizeof(int32_t));
  });
}

template <int Channels>
void horizontal_row(const Coefficients& c, const uint8_t* in, uint8_t* out) {
  for (int i = 0; i < c.outputs; ++i) {
    const int32_t* weights = &c.weights[static_cast<size_t>(i) * c.taps];
    const uint8_t* pixel = in + static_cast<size_t>(c.starts[i]) * Channels;
    int32_t sum[3] = {kHalf, kHalf, kHalf};
    for (int t = 0; t < c.counts[i]; ++t, pixel += Channels) {
      for (int channel = 0; channel < 3; ++channel) {
        sum[channel] += weights[t] * pixel[Channels == 1 ? 0 : channel];
      }
    }
    for (int channel = 0; channel < 3; ++channel) out[3 * i + channel] = to_byte(sum[channel]);
  }
}

void horizontal_scalar(const HorizontalArgs& args) {
  for (int row = 0; row < args.num_rows; ++row) {
    if (args.channels == 1) horizontal_row<1>(*args.coefficients, args.in[row], args.out[row]);
    if (args.channels == 3) horizontal_row<3>(*args.coefficients, args.in[row], args.out[row]);
    if (args.channels == 4) horizontal_row<4>(*args.coefficients, args.in[row], args.out[row]);
  }
}

void vertical_scalar(const VerticalArgs& args) {
  constexpr int kColumns = 64;  // of one block of sums, which stays in registers or L1
  for (int begin = 0; begin < args.bytes; begin += kColumns) {
    const int count = std::min(kColumns, args.bytes - begin);
    int32_t sums[kColumns];
    std::fill(sums, sums + kColumns, kHalf);
    for (int tap = 0; tap < args.steps * kTapsPerStep; ++tap) {
      int32_t weight;
      std::memcpy(&weight, args.weights + static_cast<size_t>(tap) * 4, sizeof(weight));
      const uint8_t* row = args.in[tap] + begin;
      for (int x = 0; x < count; ++x) sums[x] += weight * row[x];
    }
    for (int x = 0; x < count; ++x) args.out[begin + x] = to_byte(sums[x]);
  }
}

}  // namespace

const ResizeKernels kScalarKernels = {"scalar", [] { return true; }, pack_scalar, horizontal_scalar,
                                      vertical_scalar};

PackedWeights pack_weights(const Coefficients& coefficients, Axis axis,
                           void (*encode)(const int32_t* weights, uint8_t* out)) {
  const size_t steps = coefficients.steps;
  const size_t outputs = coefficients.starts.size();
  PackedWeights packed;
  packed.bytes.resize(outputs * steps * 16);
  for (size_t i = 0; i < outputs; ++i) {
    for (size_t step = 0; step < steps; ++step) {
      const size_t slot =
          axis == Axis::vertical ? i * steps + step : (i / 4 * steps + step) * 4 + i % 4;
      encode(&coefficients.weights[(i * steps + step) * kTapsPerStep], &packed.bytes[slot * 16]);
    }
  }
  return packed;
}

const std::vector<const ResizeKernels*>& resize_kernel_table() {
  static const std::vector<const ResizeKernels*> table = {
#if defined(__x86_64__)
    &kAvx512VbmiKernels,
    &kAvx512Kernels,
    &kAvx2Kernels,
#endif
    &kScalarKernels
  };
  return table;
}

const ResizeKernels& best_resize_kernels() {
  static const ResizeKernels& best =
      **std::find_if(resize_kernel_table().begin(), resize_kernel_table().end(),
                     [](const ResizeKernels* kernels) { return kernels->supported(); });
  return best;
}

}  // namespace turbomind::image
