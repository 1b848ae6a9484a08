// From options to a running engine. Apart from engine.cc so that an engine around a model that is
// already there needs neither backends nor checkpoints.
#include <algorithm>

#include "backend/backends.h"
#include "runtime/engine_core.h"
#include "runtime/loaded_model.h"

namespace turbomind {
namespace {

// What a checkpoint without bf16 weights was trained or calibrated with is f16.
DType activations_of(const CheckpointFiles& files) {
  const auto has = [&files](DType dtype) {
    return std::any_of(files.tensors.begin(), files.tensors.end(),
                       [dtype](const TensorEntry& tensor) { return tensor.dtype == dtype; });
  };
  return has(DType::f16) && !has(DType::bf16) ? DType::f16 : DType::bf16;
}

DType chosen_activations(const EngineOptions& options) {
  if (!options.dtype) return activations_of(options.files);
  if (options.backend.device == "cpu") {
    throw Error(
        ErrorCode::invalid_argument,
        format("dtype %s on the CPU, whose activations are always float32; leave dtype out, "
               "or name a GPU as the device",
               to_string(*options.dtype).data()));
  }
  return *options.dtype;
}

}  // namespace

std::unique_ptr<Engine> Engine::open(EngineOptions options, EventSink sink, ProgressFn progress) {
  const Stepping stepping = options.manual_stepping ? Stepping::manual : Stepping::own_thread;
  options.backend.activations = chosen_activations(options);
  return make_engine(load_model(options, make_backend(options.backend), progress), std::move(sink),
                     stepping);
}

MemoryReport Engine::estimate(EngineOptions options) {
  options.backend.activations = chosen_activations(options);
  const std::unique_ptr<Backend> backend = make_backend(options.backend);
  return estimate_model(options, *backend);
}

}  // namespace turbomind
