// The first use of a device's code, paid by loading instead of by the first request. Runs on the thread
// that opens the engine, over KV blocks that nobody owns yet.
#pragma once

#include "models/decoder.h"
#include "models/vision_tower.h"
#include "runtime/memory_plan.h"

namespace turbomind {

// Runs one layer and the sampling of steps of one sequence with 1, 2, 4, … tokens up to the plan's
// limits, and one tile of the tower, whose embedding goes to `embeddings` ([tokens per tile, H]).
// Then decode steps of one sequence of 1, 257, 513, 1025, … tokens, so that a lone request finds its
// captured steps. A CUDA driver loads a kernel when it is launched first, about a millisecond each; which kernels a
// step takes depends on its size alone, so every layer is served. `vision`: null for a text model.
void warm_up(Backend& backend, Decoder& decoder, KvCache& cache, const MemoryPlan& plan,
             VisionTower* vision, TensorView embeddings);

}  // namespace turbomind
