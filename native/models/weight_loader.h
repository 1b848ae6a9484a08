// Canonical names → weights in a backend's layout: what the decoder and the vision tower load
// themselves with. Counts bytes and reports progress. Loading thread only.
#pragma once

#include <cstddef>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "io/weights.h"
#include "models/model_spec.h"

namespace turbomind {

// Called after each weight with the checkpoint bytes done so far and in all.
using LoadProgress = std::function<void(size_t loaded_bytes, size_t total_bytes)>;

enum class Bias : uint8_t { required, optional, none };

// One linear layer as the checkpoint stores it; several of them may be loaded as one weight.
struct LinearLayer {
  std::string prefix;        // "layers.0.attn.q"
  int64_t out_features = 0;  // N
  Bias bias = Bias::none;
};

class WeightLoader {
 public:
  // measure: the backend only adds up sizes, so nothing is read ahead.
  enum class Mode : uint8_t { load, measure };
  // `store` must outlive every weight loaded: a backend may keep views of its mapping.
  WeightLoader(Backend& backend, const WeightStore& store, QuantSpec quant,
               LoadProgress progress = nullptr, Mode mode = Mode::load);

  Backend& backend() const { return backend_; }

  std::unique_ptr<LinearWeight> linear(int64_t in_features, const std::vector<LinearLayer>& layers,
                                       PartOrder order = PartOrder::concatenated);
  std::unique_ptr<LinearWeight> embedding(std::string_view name, int64_t rows, int64_t columns);
  // `name` [V, H] as language model head; `counts` is false for a tied table, already counted.
  enum class Tied : uint8_t { no, yes };
  std::unique_ptr<LinearWeight> head(std::string_view name, int64_t rows, int64_t columns,
                                     Tied tied);

  // A vector as f32 on the device. `stored` is its shape in the file, `elements` the product.
  struct Vector {
    std::unique_ptr<Buffer> buffer;
    ConstTensorView view;  // [elements] f32
  };
  Vector vector(std::string_view name, std::initializer_list<int64_t> stored);

  size_t weight_bytes() const { return weight_bytes_; }  // taken on the device so far

 private:
  LinearSource source(int64_t in_features, const std::vector<LinearLayer>& layers,
                      PartOrder order) const;
  void count(size_t file_bytes, size_t device_bytes);

  Backend& backend_;
  const WeightStore& store_;
  QuantSpec quant_;
  LoadProgress progress_;
  Mode mode_;
  size_t loaded_bytes_ = 0;
  size_t weight_bytes_ = 0;
};

}  // namespace turbomind
