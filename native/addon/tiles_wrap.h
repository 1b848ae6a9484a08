// `NativeTiles`: the JavaScript object that holds an image's tiles. JS thread only; the tiles
// themselves are shared, read-only, with the requests that use them.
#pragma once

#include <memory>

#include "addon/napi_support.h"
#include "image/preprocess.h"

namespace turbomind::addon {

class TilesWrap : public Napi::ObjectWrap<TilesWrap> {
 public:
  using Tiles = std::shared_ptr<const image::ImageTiles>;

  static Napi::Function define(Napi::Env env);
  static Napi::Object create(Napi::Env env, Tiles tiles);
  // Null unless `value` was made by `create`.
  static Tiles unwrap(const Napi::Value& value);

  explicit TilesWrap(const Napi::CallbackInfo& info);
  void Finalize(Napi::BasicEnv env) override;

 private:
  Napi::Value columns(const Napi::CallbackInfo& info);
  Napi::Value rows(const Napi::CallbackInfo& info);
  Napi::Value num_tiles(const Napi::CallbackInfo& info);
  Napi::Value tile_size(const Napi::CallbackInfo& info);
  Napi::Value content_hash(const Napi::CallbackInfo& info);
  Napi::Value pixels(const Napi::CallbackInfo& info);

  Tiles tiles_;
};

}  // namespace turbomind::addon
