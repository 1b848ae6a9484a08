// JavaScript values ⇄ native structs, as lib/native-types.ts states them. The only place that
// answers "wrong type": every message names the field by its path. JS thread only.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "addon/napi_support.h"
#include "image/content_hash.h"
#include "runtime/engine.h"

namespace turbomind::addon {

// A value and where it came from: "open: options.spec.decoder.hiddenSize".
// Every getter throws Error{invalid_argument} that names the path, the value and what was expected.
class Field {
 public:
  Field(Napi::Value value, std::string path) : value_(value), path_(std::move(path)) {}

  const Napi::Value& value() const { return value_; }
  const std::string& path() const { return path_; }
  [[noreturn]] void fail(const char* expected) const;

  Field operator[](const char* key) const;               // of an object
  Field at(uint32_t idx) const;                          // of an array
  uint32_t length() const;                               // of an array
  std::optional<Field> optional(const char* key) const;  // empty when undefined

  int64_t integer(int64_t min, int64_t max) const;
  int int32(int min = INT32_MIN) const { return static_cast<int>(integer(min, INT32_MAX)); }
  double number() const;  // finite
  bool boolean() const;
  std::string string() const;
  uint64_t unsigned_bigint() const;
  Napi::Uint8Array bytes() const;
  Napi::Function function() const;
  std::vector<uint32_t> words() const;  // of a Uint32Array
  std::vector<float> floats() const;    // of a Float32Array

 private:
  Napi::Value value_;
  std::string path_;
};

EngineOptions to_engine_options(const Field& options);
image::TileOptions to_tile_options(const Field& options);
image::ContentHash to_content_hash(const Field& digits);  // what to_hex gave, or ''
std::string to_hex(const image::ContentHash& hash);       // 32 digits
Request to_request(const Field& request);

Napi::Value to_js(Napi::Env env, const std::vector<Event>& events);
Napi::Value to_js(Napi::Env env, const EngineStats& stats);
Napi::Value to_js(Napi::Env env, const MemoryReport& report);

}  // namespace turbomind::addon
