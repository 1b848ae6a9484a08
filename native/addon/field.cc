#include "addon/field.h"

#include <cmath>

#include "base/error.h"

namespace turbomind::addon {
namespace {

// What a person passed, short enough for a message.
std::string describe(const Napi::Value& value) {
  switch (value.Type()) {
    case napi_undefined:
      return "undefined";
    case napi_null:
      return "null";
    case napi_boolean:
      return value.As<Napi::Boolean>() ? "true" : "false";
    case napi_number:
      return format("%.17g", value.As<Napi::Number>().DoubleValue());
    case napi_string: {
      const std::string text = value.As<Napi::String>();
      return text.size() <= 40 ? "'" + text + "'" : "'" + text.substr(0, 40) + "…'";
    }
    case napi_bigint:
      return "a bigint";
    case napi_symbol:
      return "a symbol";
    case napi_function:
      return "a function";
    default:
      break;
  }
  if (value.IsArray()) return "an array";
  if (value.IsTypedArray()) return "another typed array";
  return "an object";
}

template <class T>
std::vector<T> values_of(const Napi::TypedArrayOf<T>& array) {
  return {array.Data(), array.Data() + array.ElementLength()};
}

}  // namespace

void Field::fail(const char* expected) const {
  throw Error(ErrorCode::invalid_argument,
              format("%s: expected %s, got %s", path_.c_str(), expected, describe(value_).c_str()));
}

Field Field::operator[](const char* key) const {
  if (!value_.IsObject() || value_.IsArray()) fail("an object");
  return {value_.As<Napi::Object>().Get(key), path_ + "." + key};
}

std::optional<Field> Field::optional(const char* key) const {
  Field field = (*this)[key];
  if (field.value().IsUndefined()) return std::nullopt;
  return field;
}

Field Field::at(uint32_t idx) const {
  return {value_.As<Napi::Array>().Get(idx), path_ + "[" + std::to_string(idx) + "]"};
}

uint32_t Field::length() const {
  if (!value_.IsArray()) fail("an array");
  return value_.As<Napi::Array>().Length();
}

int64_t Field::integer(int64_t min, int64_t max) const {
  if (value_.IsNumber()) {
    const double number = value_.As<Napi::Number>().DoubleValue();
    if (number == std::trunc(number) && number >= static_cast<double>(min) &&
        number <= static_cast<double>(max)) {
      return static_cast<int64_t>(number);
    }
  }
  if (min == INT32_MIN && max == INT32_MAX) fail("an integer of 32 bits");
  fail(format("an integer from %lld to %lld", static_cast<long long>(min),
              static_cast<long long>(max))
           .c_str());
}

double Field::number() const {
  if (!value_.IsNumber()) fail("a number");
  const double number = value_.As<Napi::Number>().DoubleValue();
  if (!std::isfinite(number)) fail("a finite number");
  return number;
}

bool Field::boolean() const {
  if (!value_.IsBoolean()) fail("true or false");
  return value_.As<Napi::Boolean>();
}

std::string Field::string() const {
  if (!value_.IsString()) fail("a string");
  return value_.As<Napi::String>();
}

uint64_t Field::unsigned_bigint() const {
  const char* expected = "a bigint from 0n to 2n ** 64n - 1n";
  if (!value_.IsBigInt()) fail(expected);
  bool lossless = false;
  const uint64_t number = value_.As<Napi::BigInt>().Uint64Value(&lossless);
  if (!lossless) fail(expected);
  return number;
}

template <class Array>
Array Field::typed_array(napi_typedarray_type type, const char* expected) const {
  if (!value_.IsTypedArray() || value_.As<Napi::TypedArray>().TypedArrayType() != type) {
    fail(expected);
  }
  return value_.As<Array>();
}

Napi::Uint8Array Field::bytes() const {
  return typed_array<Napi::Uint8Array>(napi_uint8_array, "a Uint8Array");
}

std::vector<uint32_t> Field::words() const {
  return values_of(typed_array<Napi::Uint32Array>(napi_uint32_array, "a Uint32Array"));
}

std::vector<int32_t> Field::int32s() const {
  return values_of(typed_array<Napi::Int32Array>(napi_int32_array, "an Int32Array"));
}

std::vector<float> Field::floats() const {
  return values_of(typed_array<Napi::Float32Array>(napi_float32_array, "a Float32Array"));
}

Napi::Function Field::function() const {
  if (!value_.IsFunction()) fail("a function");
  return value_.As<Napi::Function>();
}

}  // namespace turbomind::addon
