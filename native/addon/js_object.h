// Builds plain JavaScript objects and arrays for results. Failures are ignored on purpose: creating
// values fails only while a worker is being terminated, when nobody reads them, and node-addon-api
// would turn that into exceptions out of callbacks that have no caller. JS thread only.
#pragma once

#include <string_view>

#include "addon/napi_support.h"

namespace turbomind::addon {

// A handle that may be null, so that overloads do not mistake it for another pointer.
class JsValue {
 public:
  explicit JsValue(napi_value value) : value_(value) {}
  napi_value get() const { return value_; }

 private:
  napi_value value_;
};

inline JsValue make_value(napi_env env, double number) {
  napi_value value = nullptr;
  napi_create_double(env, number, &value);
  return JsValue(value);
}

inline JsValue make_value(napi_env env, int number) {
  napi_value value = nullptr;
  napi_create_int32(env, number, &value);
  return JsValue(value);
}

inline JsValue make_value(napi_env env, std::string_view text) {
  napi_value value = nullptr;
  napi_create_string_utf8(env, text.data(), text.size(), &value);
  return JsValue(value);
}

inline JsValue make_value(napi_env, JsValue value) { return value; }

class JsObject {
 public:
  explicit JsObject(napi_env env) : env_(env) { napi_create_object(env, &object_); }
  template <class T>
  void set(const char* key, const T& value) {
    const JsValue made = make_value(env_, value);
    if (object_ != nullptr && made.get() != nullptr) {
      napi_set_named_property(env_, object_, key, made.get());
    }
  }
  JsValue value() const { return JsValue(object_); }

 private:
  napi_env env_;
  napi_value object_ = nullptr;
};

class JsArray {
 public:
  explicit JsArray(napi_env env) : env_(env) { napi_create_array(env, &array_); }
  template <class T>
  void push(const T& value) {
    const JsValue made = make_value(env_, value);
    if (array_ != nullptr && made.get() != nullptr) {
      napi_set_element(env_, array_, length_++, made.get());
    }
  }
  JsValue value() const { return JsValue(array_); }

 private:
  napi_env env_;
  napi_value array_ = nullptr;
  uint32_t length_ = 0;
};

}  // namespace turbomind::addon
