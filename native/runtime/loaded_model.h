// From a checkpoint to everything an engine needs: backend, weights, decoder, vision tower, KV cache
// and the memory plan that sizes them. Runs on the thread that opens the engine.
#pragma once

#include <memory>

#include "backend/backend.h"
#include "runtime/engine.h"
#include "runtime/engine_core.h"

namespace turbomind {

// The numbers that load_model would plan with, from the table of tensors alone. Throws as it would.
MemoryReport estimate_model(const EngineOptions& options, Backend& backend);

// Throws Error: a bad spec or checkpoint, options out of range, or memory that does not suffice.
EngineParts load_model(const EngineOptions& options, std::unique_ptr<Backend> backend,
                       const ProgressFn& progress);

}  // namespace turbomind
