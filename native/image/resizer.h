// One resize of one image, cut into bands of output rows that any threads may run in any order.
// Both passes of a band run row by row through a small ring of horizontally resized rows, so that
// nothing larger than a few rows lies between input and output.
#pragma once

#include <cstdint>

#include "image/preprocess.h"
#include "image/resize_kernels.h"

namespace turbomind::image {

// Where output pixels go: an array of segments in row-major order, each [height, width, 3].
// A plain image is one segment; a tile grid is `columns` segments a row.
struct SegmentedOutput {
  uint8_t* pixels = nullptr;
  int width = 0;  // of a segment, pixels
  int height = 0;
  int columns = 1;  // segments side by side

  uint8_t* row(int segment_column, int y) const {
    const size_t segment = static_cast<size_t>(y / height) * columns + segment_column;
    return pixels + (segment * height + y % height) * width * 3;
  }
};

class Resizer {
 public:
  // The view and the kernels must outlive this object.
  Resizer(const ImageView& in, int out_width, int out_height, const ResizeKernels& kernels);

  int out_height() const { return out_height_; }
  // First input row that the band starting at output row `y` reads.
  int first_input_row(int y) const;
  // A band's cost in touched bytes; only proportions matter.
  int64_t cost() const;
  // Writes output rows [begin, end). Thread-safe.
  void run(int begin, int end, const SegmentedOutput& out) const;

 private:
  class Band;

  ImageView in_;
  int out_width_;
  int out_height_;
  const ResizeKernels& kernels_;
  bool resizes_width_;
  bool resizes_height_;
  Coefficients horizontal_;  // empty when the width stays
  Coefficients vertical_;    // empty when the height stays
  PackedWeights horizontal_weights_;
  PackedWeights vertical_weights_;
  size_t read_end_ = 0;  // bytes from an input row's start that the horizontal kernel may read
};

}  // namespace turbomind::image
