// JavaScript values ⇄ native structs, as lib/native-types.ts states them: options, requests and reports
// have a file each; field.h answers "wrong type". JS thread only.
#pragma once

#include <string>
#include <vector>

#include "addon/field.h"
#include "image/content_hash.h"
#include "runtime/engine.h"

namespace turbomind::addon {

EngineOptions to_engine_options(const Field& options);
image::TileOptions to_tile_options(const Field& options);
image::ContentHash to_content_hash(const Field& digits);  // what to_hex gave, or ''
std::string to_hex(const image::ContentHash& hash);       // 32 digits
Request to_request(const Field& request);

Napi::Value to_js(Napi::Env env, const std::vector<Event>& events);
Napi::Value to_js(Napi::Env env, const EngineStats& stats);
Napi::Value to_js(Napi::Env env, const MemoryReport& report);

}  // namespace turbomind::addon
