// The module: the functions of lib/native-types.ts `NativeAddon`, defined anew for every
// environment that loads the file. Engines and tiles have files of their own.
#include <memory>

#include "addon/convert.h"
#include "addon/engine_session.h"
#include "addon/engine_wrap.h"
#include "addon/environment.h"
#include "addon/host_info.h"
#include "addon/js_object.h"
#include "addon/tiles_wrap.h"

#define TM_STRINGIFY(x) #x
#define TM_TEXT(x) TM_STRINGIFY(x)

namespace turbomind::addon {
namespace {

constexpr const char* kVersion = TM_TEXT(TURBOMIND_VERSION);  // package.json's

// The image of arguments (pixels, width, height[, channels]), still in JavaScript's memory.
image::ImageView to_image_view(const Napi::CallbackInfo& info, const char* function, int channels) {
  const std::string prefix = std::string(function) + ": ";
  const Napi::Uint8Array pixels = Field(info[0], prefix + "pixels").bytes();
  const image::ImageView view{pixels.Data(), Field(info[1], prefix + "width").int32(),
                              Field(info[2], prefix + "height").int32(), channels};
  image::check_size(view.width, view.height);
  const size_t expected = static_cast<size_t>(view.width) * view.height * channels;
  if (pixels.ByteLength() != expected) {
    throw Error(ErrorCode::invalid_image,
                format("%spixels: %d x %d x %d need %zu bytes, got %zu", prefix.c_str(), view.width,
                       view.height, channels, expected, pixels.ByteLength()));
  }
  image::check_image(view);
  return view;
}

Napi::Value open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guard_promise(env, [&](const Napi::Promise::Deferred& deferred) {
    const Napi::Function on_events = Field(info[1], "open: onEvents").function();
    const Napi::Function on_progress = Field(info[2], "open: onProgress").function();
    EngineSession::open(env, to_engine_options(Field(info[0], "open: options")), on_events,
                        on_progress, deferred);
  });
}

// Not a promise: the files are mapped, their weights are not read.
Napi::Value estimate(const Napi::CallbackInfo& info) {
  return guard(info.Env(), [&] {
    return to_js(info.Env(),
                 Engine::estimate(to_engine_options(Field(info[0], "estimate: options"))));
  });
}

Napi::Value make_tiles(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guard_promise(env, [&](const Napi::Promise::Deferred& deferred) {
    const image::TileOptions options = to_tile_options(Field(info[4], "makeTiles: options"));
    image::check_options(options);
    const image::ImageView view =
        to_image_view(info, "makeTiles", Field(info[3], "makeTiles: channels").int32());
    // Not copied: a picture of 100 MB would block the JS thread for longer than a token takes. The
    // reference goes back on the JS thread, whichever thread lets go of its holder last.
    auto pixels =
        std::make_shared<Napi::ObjectReference>(Napi::Persistent(info[0].As<Napi::Object>()));

    Environment& environment = Environment::of(env);
    image::TilePool& pool = environment.tile_pool();
    environment.calls().begin();
    pool.submit(
        view, options,
        [&calls = environment.calls(), deferred, pixels = std::move(pixels)](
            TilesWrap::Tiles tiles, std::exception_ptr failure) {
          calls.finish([deferred, pixels, tiles = std::move(tiles), failure](Napi::Env woken) {
            pixels->Reset();
            if (failure) return deferred.Reject(js_error(woken, failure).Value());
            deferred.Resolve(TilesWrap::create(woken, tiles));
          });
        });
  });
}

// On the JS thread, so that nothing can take the memory away meanwhile.
Napi::Value hash_bytes(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guard(env, [&]() -> Napi::Value {
    const Napi::Uint8Array bytes = Field(info[0], "hashBytes: bytes").bytes();
    const image::ContentHash previous = to_content_hash(Field(info[1], "hashBytes: previous"));
    return Napi::String::New(
        env, to_hex(image::content_hash(bytes.Data(), bytes.ByteLength(), previous)));
  });
}

Napi::Value choose_grid(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guard(env, [&]() -> Napi::Value {
    const image::TileGrid grid = image::choose_grid(
        Field(info[0], "chooseGrid: width").int32(), Field(info[1], "chooseGrid: height").int32(),
        to_tile_options(Field(info[2], "chooseGrid: options")));
    JsObject object(env);
    object.set("columns", grid.columns);
    object.set("rows", grid.rows);
    return {env, object.value().get()};
  });
}

Napi::Value resize_bicubic(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guard(env, [&]() -> Napi::Value {
    const int out_width = Field(info[3], "resizeBicubic: outWidth").int32();
    const int out_height = Field(info[4], "resizeBicubic: outHeight").int32();
    image::check_size(out_width, out_height);
    const image::ImageView view = to_image_view(info, "resizeBicubic", 3);
    Napi::Uint8Array out =
        Napi::Uint8Array::New(env, static_cast<size_t>(out_width) * out_height * 3);
    image::resize_bicubic(view, out_width, out_height, {out.Data(), out.ByteLength()});
    return out;
  });
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto environment = std::make_unique<Environment>(env);
  environment->tiles_class = Napi::Persistent(TilesWrap::define(env));
  environment->engine_class = Napi::Persistent(EngineWrap::define(env));
  env.SetInstanceData(environment.release());
  exports.Set("version", kVersion);
  exports.Set("cpuInfo", Napi::Function::New(env, cpu_info, "cpuInfo"));
  exports.Set("queryCuda", Napi::Function::New(env, query_cuda, "queryCuda"));
  exports.Set("open", Napi::Function::New(env, open, "open"));
  exports.Set("estimate", Napi::Function::New(env, estimate, "estimate"));
  exports.Set("makeTiles", Napi::Function::New(env, make_tiles, "makeTiles"));
  exports.Set("hashBytes", Napi::Function::New(env, hash_bytes, "hashBytes"));
  exports.Set("chooseGrid", Napi::Function::New(env, choose_grid, "chooseGrid"));
  exports.Set("resizeBicubic", Napi::Function::New(env, resize_bicubic, "resizeBicubic"));
  return exports;
}

}  // namespace
}  // namespace turbomind::addon

// The macro pastes the function's name, so it must be an unqualified one.
static Napi::Object init_turbomind(Napi::Env env, Napi::Object exports) {
  return turbomind::addon::init(env, exports);
}

NODE_API_MODULE(turbomind, init_turbomind)
