#include "addon/tiles_wrap.h"

#include <cstring>

#include "addon/convert.h"
#include "addon/environment.h"

namespace turbomind::addon {
namespace {

// Random; marks objects whose wrapped pointer is a TilesWrap of this addon.
constexpr napi_type_tag kTilesTag = {0x5c1f7a42e09b4d36ULL, 0xa7d3086bf2914ec5ULL};

}  // namespace

Napi::Function TilesWrap::define(Napi::Env env) {
  return DefineClass(env, "NativeTiles",
                     {InstanceAccessor<&TilesWrap::columns>("columns", napi_enumerable),
                      InstanceAccessor<&TilesWrap::rows>("rows", napi_enumerable),
                      InstanceAccessor<&TilesWrap::num_tiles>("numTiles", napi_enumerable),
                      InstanceAccessor<&TilesWrap::tile_size>("tileSize", napi_enumerable),
                      InstanceAccessor<&TilesWrap::content_hash>("contentHash", napi_enumerable),
                      InstanceMethod<&TilesWrap::pixels>("pixels")});
}

Napi::Object TilesWrap::create(Napi::Env env, Tiles tiles) {
  Environment& environment = Environment::of(env);
  environment.new_tiles = std::move(tiles);
  return environment.tiles_class.New({});
}

TilesWrap::Tiles TilesWrap::unwrap(const Napi::Value& value) {
  if (!value.IsObject()) return nullptr;
  const Napi::Object object = value.As<Napi::Object>();
  if (!object.CheckTypeTag(&kTilesTag)) return nullptr;
  return Unwrap(object)->tiles_;
}

TilesWrap::TilesWrap(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  // `create` leaves the tiles for us; anybody else has got hold of the class through an instance.
  tiles_ = std::exchange(Environment::of(info.Env()).new_tiles, nullptr);
  if (tiles_ == nullptr) {
    throw js_error(info.Env(), ErrorCode::invalid_argument,
                   "NativeTiles cannot be constructed; use makeTiles()");
  }
  info.This().As<Napi::Object>().TypeTag(&kTilesTag);
  Napi::MemoryManagement::AdjustExternalMemory(info.Env(),
                                               static_cast<int64_t>(tiles_->pixels.size()));
}

void TilesWrap::Finalize(Napi::BasicEnv env) {
  if (tiles_ == nullptr) return;
  Napi::MemoryManagement::AdjustExternalMemory(env, -static_cast<int64_t>(tiles_->pixels.size()));
}

Napi::Value TilesWrap::columns(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), tiles_->grid.columns);
}

Napi::Value TilesWrap::rows(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), tiles_->grid.rows);
}

Napi::Value TilesWrap::num_tiles(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), tiles_->num_tiles);
}

Napi::Value TilesWrap::tile_size(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), tiles_->tile_size);
}

Napi::Value TilesWrap::content_hash(const Napi::CallbackInfo& info) {
  const uint64_t(&words)[2] = tiles_->content_hash;
  return Napi::String::New(info.Env(), to_hex({{words[0], words[1]}}));
}

// A copy: external array buffers are refused by Electron's memory cage.
Napi::Value TilesWrap::pixels(const Napi::CallbackInfo& info) {
  Napi::Uint8Array copy = Napi::Uint8Array::New(info.Env(), tiles_->pixels.size());
  std::memcpy(copy.Data(), tiles_->pixels.data(), tiles_->pixels.size());
  return copy;
}

}  // namespace turbomind::addon
