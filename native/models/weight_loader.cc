// Joins what the formats load into one LinearSource per weight and hands it to the backend.
#include "models/weight_loader.h"

#include <algorithm>

#include "quant/weight_format.h"

namespace turbomind {
namespace {

size_t file_bytes(const LinearSource& source) {
  size_t bytes = 0;
  for (const LinearPart& part : source.parts) {
    for (const ConstTensorView& view :
         {part.weight, part.qweight, part.qzeros, part.scales, part.bias}) {
      if (view) bytes += view.bytes();
    }
  }
  return bytes;
}

void prefetch(const LinearSource& source) {
  for (const LinearPart& part : source.parts) {
    if (part.weight) WeightStore::prefetch(part.weight);
    if (part.qweight) WeightStore::prefetch(part.qweight);
  }
}

ConstTensorView load_bias(const WeightStore& store, const LinearLayer& layer) {
  const std::string name = layer.prefix + ".bias";
  if (layer.bias == Bias::none && store.has(name)) {
    throw Error(ErrorCode::tensor_mismatch,
                format("the checkpoint holds %s, but the config says that this layer has no bias",
                       store.describe(name).c_str()));
  }
  if (layer.bias == Bias::none || (layer.bias == Bias::optional && !store.has(name))) return {};
  const ConstTensorView bias = store.view(name, {layer.out_features});
  check_float_dtype(store, name, bias);
  return bias;
}

}  // namespace

WeightLoader::WeightLoader(Backend& backend, const WeightStore& store, QuantSpec quant,
                           LoadProgress progress, Mode mode)
    : backend_(backend),
      store_(store),
      quant_(quant),
      progress_(std::move(progress)),
      mode_(mode) {}

LinearSource WeightLoader::source(int64_t in_features, const std::vector<LinearLayer>& layers,
                                  PartOrder order) const {
  LinearSource source;
  source.in_features = in_features;
  source.order = order;
  for (const LinearLayer& layer : layers) {
    const WeightFormat& format = weight_format_of(store_, layer.prefix);
    LinearPart part =
        format.load(store_, layer.prefix, {in_features, layer.out_features}, quant_.group_size);
    part.bias = load_bias(store_, layer);
    if (!source.parts.empty() && part.kind != source.kind()) {
      throw Error(
          ErrorCode::unsupported_quantization,
          turbomind::format("layers '%s' and '%s' are computed as one, but only one of them "
                            "is quantised",
                            layers.front().prefix.c_str(), layer.prefix.c_str()));
    }
    source.name += (source.name.empty() ? "" : "+") + layer.prefix;
    source.parts.push_back(part);
  }
  source.group_size = source.kind() == WeightKind::dense ? 0 : quant_.group_size;
  return source;
}

std::unique_ptr<LinearWeight> WeightLoader::linear(int64_t in_features,
                                                   const std::vector<LinearLayer>& layers,
                                                   PartOrder order) {
  const LinearSource source = this->source(in_features, layers, order);
  if (mode_ == Mode::load) prefetch(source);
  std::unique_ptr<LinearWeight> weight = backend_.load_linear(source);
  count(file_bytes(source), weight->bytes());
  return weight;
}

std::unique_ptr<LinearWeight> WeightLoader::embedding(std::string_view name, int64_t rows,
                                                      int64_t columns) {
  const ConstTensorView table = store_.view(name, {rows, columns});
  check_float_dtype(store_, name, table);
  std::unique_ptr<LinearWeight> weight = backend_.load_embedding(table);
  count(table.bytes(), weight->bytes());
  return weight;
}

std::unique_ptr<LinearWeight> WeightLoader::head(std::string_view name, int64_t rows,
                                                 int64_t columns, Tied tied) {
  LinearSource source;
  source.name = name;
  source.in_features = columns;
  LinearPart part;
  part.out_features = rows;
  part.weight = store_.view(name, {rows, columns});
  check_float_dtype(store_, name, part.weight);
  source.parts.push_back(part);
  std::unique_ptr<LinearWeight> weight = backend_.load_head(source);
  count(tied == Tied::yes ? 0 : part.weight.bytes(), weight->bytes());
  return weight;
}

WeightLoader::Vector WeightLoader::vector(std::string_view name,
                                          std::initializer_list<int64_t> stored) {
  const ConstTensorView source = store_.view(name, stored);
  check_float_dtype(store_, name, source);
  Vector vector;
  vector.buffer = backend_.load_vector(source);
  vector.view = ConstTensorView(vector.buffer->data(), DType::f32, {source.elements()});
  count(source.bytes(), vector.buffer->bytes());
  return vector;
}

void WeightLoader::count(size_t file_bytes, size_t device_bytes) {
  loaded_bytes_ += file_bytes;
  weight_bytes_ += device_bytes;
  if (progress_) progress_(std::min(loaded_bytes_, store_.total_bytes()), store_.total_bytes());
}

}  // namespace turbomind
