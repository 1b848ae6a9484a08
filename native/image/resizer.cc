#include "image/resizer.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "base/types.h"

namespace turbomind::image {
namespace {

// One row as RGB: grey spread, alpha dropped.
void copy_as_rgb(const uint8_t* in, int channels, int width, uint8_t* out) {
  if (channels == 3) {
    std::memcpy(out, in, static_cast<size_t>(width) * 3);
    return;
  }
  const int green = channels == 1 ? 0 : 1;
  const int blue = channels == 1 ? 0 : 2;
  for (int x = 0; x < width; ++x, in += channels, out += 3) {
    out[0] = in[0];
    out[1] = in[green];
    out[2] = in[blue];
  }
}

}  // namespace

Resizer::Resizer(const ImageView& in, int out_width, int out_height, const ResizeKernels& kernels)
    : in_(in),
      out_width_(out_width),
      out_height_(out_height),
      kernels_(kernels),
      resizes_width_(in.width != out_width),
      resizes_height_(in.height != out_height) {
  if (resizes_width_) {
    horizontal_ = bicubic_coefficients(in.width, out_width);
    horizontal_weights_ = kernels.pack(horizontal_, Axis::horizontal, in.channels);
    const int last = *std::max_element(horizontal_.starts.begin(), horizontal_.starts.end());
    read_end_ = static_cast<size_t>(last + horizontal_.taps) * in.channels + kReadSlack;
  }
  if (resizes_height_) {
    vertical_ = bicubic_coefficients(in.height, out_height);
    vertical_weights_ = kernels.pack(vertical_, Axis::vertical, in.channels);
  }
}

int Resizer::first_input_row(int y) const { return resizes_height_ ? vertical_.starts[y] : y; }

int64_t Resizer::cost() const {
  const int64_t horizontal =
      resizes_width_ ? static_cast<int64_t>(in_.height) * out_width_ * horizontal_.steps : 0;
  const int64_t vertical =
      resizes_height_ ? static_cast<int64_t>(out_height_) * out_width_ * vertical_.steps : 0;
  return horizontal + vertical + static_cast<int64_t>(out_height_) * out_width_;
}

// The state of one run: the ring of RGB rows of the output's width, and how far it has come.
class Resizer::Band {
 public:
  Band(const Resizer& resizer, int end_row)
      : r_(resizer),
        end_row_(end_row),
        capacity_((r_.resizes_height_ ? r_.vertical_.max_count : 1) + kRowsAtOnce),
        stride_(round_up<size_t>(static_cast<size_t>(r_.out_width_) * 3 + kWriteSlack, 64)),
        ring_(std::make_unique_for_overwrite<uint8_t[]>(stride_ * capacity_)) {}

  // Input row `y` at the output's width. Rows are asked for in windows that move down.
  const uint8_t* row(int y) const {
    if (reads_input_directly()) return r_.in_.pixels + static_cast<size_t>(y) * in_stride();
    return slot(y);
  }

  // Makes rows [begin, end) available; rows before `begin` may be dropped.
  void advance(int begin, int end) {
    if (reads_input_directly()) return;
    next_ = std::max(next_, begin);
    while (next_ < end) {
      const int count = std::min(kRowsAtOnce, end_row_ - next_);
      make_rows(next_, count);
      next_ += count;
    }
  }

 private:
  bool reads_input_directly() const { return !r_.resizes_width_ && r_.in_.channels == 3; }
  size_t in_stride() const { return static_cast<size_t>(r_.in_.width) * r_.in_.channels; }
  uint8_t* slot(int y) const { return ring_.get() + static_cast<size_t>(y % capacity_) * stride_; }

  void make_rows(int first, int count) {
    if (!r_.resizes_width_) {
      for (int y = first; y < first + count; ++y) {
        copy_as_rgb(r_.in_.pixels + y * in_stride(), r_.in_.channels, r_.out_width_, slot(y));
      }
      return;
    }
    HorizontalArgs args{.coefficients = &r_.horizontal_,
                        .weights = &r_.horizontal_weights_,
                        .channels = r_.in_.channels,
                        .num_rows = count};
    for (int i = 0; i < count; ++i) {
      args.in[i] = readable_row(first + i, i);
      args.out[i] = slot(first + i);
    }
    r_.kernels_.horizontal(args);
  }

  // Kernels read whole vectors. Inside the image that reaches into the next row, under zero
  // weights; the last rows of the image are copied to where there is room behind them.
  const uint8_t* readable_row(int y, int copy_idx) {
    const size_t offset = y * in_stride();
    const size_t total = r_.in_.height * in_stride();
    if (offset + r_.read_end_ <= total) return r_.in_.pixels + offset;
    if (copies_.empty()) copies_.resize(r_.read_end_ * kRowsAtOnce);
    uint8_t* copy = copies_.data() + copy_idx * r_.read_end_;
    std::memcpy(copy, r_.in_.pixels + offset, std::min(r_.read_end_, in_stride()));
    return copy;
  }

  const Resizer& r_;
  int end_row_;  // one past the last input row of this band
  int capacity_;
  size_t stride_;
  std::unique_ptr<uint8_t[]> ring_;
  std::vector<uint8_t> copies_;
  int next_ = 0;  // first input row that is not in the ring yet
};

void Resizer::run(int begin, int end, const SegmentedOutput& out) const {
  const int segment_bytes = out.width * 3;
  if (!resizes_height_) {
    Band band(*this, end);
    for (int y = begin; y < end; ++y) {
      band.advance(y, y + 1);
      for (int column = 0; column < out.columns; ++column) {
        std::memcpy(out.row(column, y), band.row(y) + column * segment_bytes, segment_bytes);
      }
    }
    return;
  }
  const int taps = vertical_.taps;
  Band band(*this, vertical_.starts[end - 1] + vertical_.counts[end - 1]);
  std::vector<const uint8_t*> rows(taps);
  for (int y = begin; y < end; ++y) {
    const int first = vertical_.starts[y];
    const int count = vertical_.counts[y];
    band.advance(first, first + count);
    // Taps beyond `count` have zero weights and may read any row.
    for (int t = 0; t < taps; ++t) rows[t] = band.row(first + std::min(t, count - 1));
    const size_t weights_offset = static_cast<size_t>(y) * vertical_.steps * 16;
    VerticalArgs args{.in = rows.data(),
                      .weights = &vertical_weights_.bytes[weights_offset],
                      .steps = vertical_.steps,
                      .bytes = segment_bytes};
    for (int column = 0; column < out.columns; ++column) {
      args.out = out.row(column, y);
      kernels_.vertical(args);
      for (const uint8_t*& row : rows) row += segment_bytes;
    }
  }
}

}  // namespace turbomind::image
