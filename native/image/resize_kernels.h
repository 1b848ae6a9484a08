// The two row kernels of the resize, once per instruction set: a horizontal pass that turns input
// rows into RGB rows, and a vertical pass that turns several RGB rows into one. All of them are
// integer sums, so every row of the table gives the same bits; `scalar` is the reference.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "image/coefficients.h"

namespace turbomind::image {

enum class Axis { horizontal, vertical };

// Weights as a kernel wants them: 16 bytes for each output and step of four taps.
struct PackedWeights {
  // horizontal: [groups of 4 outputs, steps, 4, 16]; vertical: [padded outputs, steps, 16]
  std::vector<uint8_t> bytes;
  std::vector<uint8_t> indices;  // horizontal: [groups, 64] byte gather of a group; may be empty
};

// Lays the weights out for an axis; `encode` turns four weights into 16 bytes.
PackedWeights pack_weights(const Coefficients& coefficients, Axis axis,
                           void (*encode)(const int32_t* weights, uint8_t* out));

struct HorizontalArgs {
  const Coefficients* coefficients = nullptr;
  const PackedWeights* weights = nullptr;
  int channels = 3;           // of the input; grey is spread, alpha dropped
  const uint8_t* in[4] = {};  // rows; kReadSlack bytes past the last tap are readable
  uint8_t* out[4] = {};       // [outputs, 3]; kWriteSlack bytes past it are writable
  int num_rows = 0;           // 1 to 4
};

struct VerticalArgs {
  const uint8_t* const* in = nullptr;  // [steps * 4] rows of `bytes` bytes
  const uint8_t* weights = nullptr;    // [steps, 16], one output of PackedWeights
  int steps = 0;
  int bytes = 0;
  uint8_t* out = nullptr;  // exactly `bytes` are written
};

constexpr int kReadSlack = 64;
constexpr int kWriteSlack = 32;
constexpr int kRowsAtOnce = 4;

struct ResizeKernels {
  std::string_view name;
  bool (*supported)();  // by this CPU and operating system
  PackedWeights (*pack)(const Coefficients& coefficients, Axis axis, int channels);
  void (*horizontal)(const HorizontalArgs& args);
  void (*vertical)(const VerticalArgs& args);
};

// All rows compiled in, fastest first, `scalar` last.
const std::vector<const ResizeKernels*>& resize_kernel_table();
// The first row that this machine supports.
const ResizeKernels& best_resize_kernels();

extern const ResizeKernels kScalarKernels;
extern const ResizeKernels kAvx2Kernels;        // x86-64 only
extern const ResizeKernels kAvx512Kernels;      // x86-64 only: VNNI
extern const ResizeKernels kAvx512VbmiKernels;  // x86-64 only: VNNI and VBMI

}  // namespace turbomind::image
