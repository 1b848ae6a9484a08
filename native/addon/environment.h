// What belongs to one Node environment (the main thread or a worker): classes, the queue back to its
// JS thread, preprocessing threads, open engines. Nothing in this addon is static, so any number of
// environments load it side by side. Teardown is driven by cleanup hooks: stop, join, release.
#pragma once

#include <memory>
#include <unordered_map>

#include "addon/call_queue.h"
#include "addon/napi_support.h"
#include "image/tile_pool.h"

namespace turbomind::addon {

class EngineSession;

class Environment {
 public:
  explicit Environment(Napi::Env env);
  static Environment& of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

  CallQueue& calls() { return calls_; }
  image::TilePool& tile_pool();  // its threads start at the first use

  // Keeps a session alive until its native work has ended, whatever happens to its wrapper.
  void add_session(std::shared_ptr<EngineSession> session);
  void remove_session(const EngineSession* session);

  Napi::FunctionReference tiles_class;
  Napi::FunctionReference engine_class;
  // Handed to the constructors by TilesWrap::create and EngineWrap::create.
  std::shared_ptr<const image::ImageTiles> new_tiles;
  std::shared_ptr<EngineSession> new_session;

 private:
  static void on_cleanup(void* self);

  CallQueue calls_;
  std::unique_ptr<image::TilePool> tile_pool_;
  std::unordered_map<const EngineSession*, std::shared_ptr<EngineSession>> sessions_;
};

}  // namespace turbomind::addon
