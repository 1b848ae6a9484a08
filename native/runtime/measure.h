// What a model will take, before anything of it is taken: its weights and activations are "loaded"
// through a backend that only adds up sizes, by the very code that loads them afterwards. Reads the
// table of tensors, never their data.
#pragma once

#include "backend/backend.h"
#include "io/weights.h"
#include "models/model_spec.h"
#include "runtime/memory_plan.h"

namespace turbomind {

// What the workspace of an engine must hold.
Backend::WorkspaceSpec workspace_of(const Backend& backend, const ModelSpec& spec,
                                    const MemoryPlan& steps, const KvCacheSpec& cache,
                                    int session_len);

// Of the embeddings of all tiles that are held at a time; the spec has a vision tower.
size_t image_store_bytes(const Backend& backend, const ModelSpec& spec, const MemoryPlan& steps);

// Tiles through the vision tower at once: what suits the device, and no more than a step encodes.
int tiles_per_pass(const Backend& backend, const VisionSpec& spec, int max_tiles);

// All parts of the plan but the KV cache. Throws Error as loading would for a checkpoint whose
// tensors do not fit the spec.
MemoryParts measure_model(Backend& backend, const WeightStore& store, const ModelSpec& spec,
                          const MemoryPlan& steps, const KvCacheSpec& cache, int session_len);

}  // namespace turbomind
