// A JavaScript value that knows its place, and getters that answer "wrong type" with it: every message
// names the field by its path. JS thread only.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "addon/napi_support.h"

namespace turbomind::addon {

inline constexpr int64_t kMaxSafeInteger = (1LL << 53) - 1;

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
  std::vector<int32_t> int32s() const;  // of an Int32Array
  std::vector<float> floats() const;    // of a Float32Array

 private:
  template <class Array>
  Array typed_array(napi_typedarray_type type, const char* expected) const;

  Napi::Value value_;
  std::string path_;
};

}  // namespace turbomind::addon
