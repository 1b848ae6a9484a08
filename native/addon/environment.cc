#include "addon/environment.h"

#include <algorithm>

#include "addon/engine_session.h"
#include "backend/cpu/isa.h"

namespace turbomind::addon {

Environment::Environment(Napi::Env env) : calls_(env) {
  // Hooks run last in, first out. This one comes after the thread-safe function of calls_, whose
  // own hook destroys it, so whatever signals it is joined before.
  napi_add_env_cleanup_hook(env, &Environment::on_cleanup, this);
}

image::TilePool& Environment::tile_pool() {
  if (!tile_pool_) {
    constexpr int kMostThreads = 16;  // beyond it one image has too few bands to share
    tile_pool_ =
        std::make_unique<image::TilePool>(std::clamp(cpu::usable_threads(), 1, kMostThreads));
  }
  return *tile_pool_;
}

void Environment::add_session(std::shared_ptr<EngineSession> session) {
  const EngineSession* key = session.get();
  sessions_.emplace(key, std::move(session));
}

void Environment::remove_session(const EngineSession* session) { sessions_.erase(session); }

// Sessions have hooks of their own, which ran before this one.
void Environment::on_cleanup(void* self) {
  auto& environment = *static_cast<Environment*>(self);
  environment.tile_pool_.reset();
  environment.sessions_.clear();
  environment.calls_.stop();
}

}  // namespace turbomind::addon
