// From options to a running engine. Apart from engine.cc so that an engine around a model that is
// already there needs neither backends nor checkpoints.
#include "backend/backends.h"
#include "runtime/engine_core.h"
#include "runtime/loaded_model.h"

namespace turbomind {

std::unique_ptr<Engine> Engine::open(EngineOptions options, EventSink sink, ProgressFn progress) {
  const Stepping stepping = options.manual_stepping ? Stepping::manual : Stepping::own_thread;
  return make_engine(load_model(options, make_backend(options.backend), progress), std::move(sink),
                     stepping);
}

}  // namespace turbomind
