#include "backend/cuda/split_norms.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int64_t kMaxColumns = int64_t{1} << 16;  // a longer vector is no norm's

// The least power of two that no value exceeds in magnitude; 0 where none serves.
float power_above(const std::vector<float>& values) {
  float largest = 0.0F;
  for (float value : values) {
    if (!std::isfinite(value)) return 0.0F;
    largest = std::max(largest, std::abs(value));
  }
  constexpr int kFar = 60;  // its inverse, and its product with any rms, are normal floats
  int exponent = 0;
  const float mantissa = std::frexp(largest, &exponent);
  if (mantissa == 0.0F || std::abs(exponent) > kFar) return 0.0F;
  return std::ldexp(1.0F, mantissa == 0.5F ? exponent - 1 : exponent);
}

}  // namespace

class SplitNorms::TrackedVector final : public Buffer {
 public:
  TrackedVector(std::shared_ptr<Vectors> vectors, std::shared_ptr<Buffer> buffer)
      : vectors_(std::move(vectors)), buffer_(std::move(buffer)) {}
  ~TrackedVector() override { vectors_->erase(buffer_->data()); }
  void* data() override { return buffer_->data(); }
  size_t bytes() const override { return buffer_->bytes(); }

 private:
  std::shared_ptr<Vectors> vectors_;
  std::shared_ptr<Buffer> buffer_;  // shared with a conversion under way
};

std::unique_ptr<Buffer> SplitNorms::track(std::shared_ptr<Buffer> buffer, int64_t count) {
  (*vectors_)[buffer->data()] = {.count = count};
  return std::make_unique<TrackedVector>(vectors_, std::move(buffer));
}

void SplitNorms::read_peaks(CudaStream stream) {
  std::vector<float> values;
  for (auto& [data, vector] : *vectors_) {
    if (vector.known) continue;
    vector.known = true;
    if (vector.count % kWideStrip != 0 || vector.count > kMaxColumns) continue;
    values.resize(static_cast<size_t>(vector.count));
    cuda_check(cudaMemcpyAsync(values.data(), data, values.size() * sizeof(float),
                               cudaMemcpyDeviceToHost, stream),
               "reading a norm's weights");
    cuda_check(cudaStreamSynchronize(stream), "reading a norm's weights");
    vector.peak = power_above(values);
  }
}

size_t SplitNorms::strip_bytes(int tokens, int64_t columns) {
  return static_cast<size_t>(tokens) * sizeof(float) *
         static_cast<size_t>(ceil_div<int64_t>(columns, kNarrowStrip));
}

void SplitNorms::reserve(DevicePool& pool, int tokens, int64_t columns) {
  strips_ = pool.allocate(strip_bytes(tokens, columns));
  scales_ = pool.allocate(scale_bytes(tokens));
  max_columns_ = columns;
}

void SplitNorms::release() {
  forget();
  strips_.reset();
  scales_.reset();
  max_columns_ = 0;
}

NextNorm SplitNorms::next(const Norm& norm, WeightKind writer, int64_t columns, int tokens,
                          void* z) const {
  const auto known = vectors_->find(norm.weight.data);
  if (norm.kind != NormKind::rms || norm.bias || columns > max_columns_ ||
      known == vectors_->end() || known->second.count != columns || known->second.peak == 0.0F) {
    return {};
  }
  return {.weight = static_cast<const float*>(norm.weight.data),
          .inverse_peak = 1.0F / known->second.peak,
          .z = z,
          .strips = static_cast<float*>(strips_->data()),
          .strip_columns = strip_columns(writer, tokens)};
}

void SplitNorms::left(const void* x, int64_t rows, const Norm& norm, const NextNorm& next) {
  x_ = x;
  weight_ = next.weight;
  rows_ = rows;
  strip_columns_ = next.strip_columns;
  peak_ = 1.0F / next.inverse_peak;
  eps_ = norm.eps;
}

void SplitNorms::forget(const void* x) {
  if (x == nullptr || x == x_) x_ = nullptr;
}

bool SplitNorms::has(const void* x, int64_t rows, const Norm& norm) const {
  return x_ != nullptr && x == x_ && rows == rows_ && norm.weight.data == weight_ &&
         norm.eps == eps_;
}

InputNorm SplitNorms::input(const LaunchContext& context, int64_t columns, int tokens) const {
  InputNorm norm{.strips = static_cast<const float*>(strips_->data()),
                 .strip_columns = strip_columns_,
                 .columns = static_cast<int>(columns),
                 .inverse_columns = 1.0F / static_cast<float>(columns),
                 .peak = peak_,
                 .eps = eps_};
  if (!folds_in_ctas(context.sm, columns, tokens)) {
    auto* scales = static_cast<float*>(scales_->data());
    fold_strips(context, norm, scales, tokens);
    norm.scales = scales;
  }
  return norm;
}

}  // namespace turbomind::cuda
