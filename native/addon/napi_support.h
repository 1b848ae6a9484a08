// The one place that includes node-addon-api, and the one `guard` between C++ exceptions and
// JavaScript errors. JS thread only.
#pragma once

// A worker that is being terminated refuses to run JavaScript; an error that can no longer be thrown
// is dropped then, instead of ending the process.
#define NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS
#include <napi.h>

#include <exception>
#include <string>

#include "base/error.h"

namespace turbomind::addon {

// An Error whose `code` is to_string(code).
Napi::Error js_error(Napi::Env env, ErrorCode code, const std::string& message);
// The same for whatever was caught; unknown exceptions become ERR_TM_INTERNAL.
Napi::Error js_error(Napi::Env env, const std::exception_ptr& exception);

// Runs `body`; whatever it throws leaves as a JavaScript error with a code.
template <class Body>
auto guard(Napi::Env env, Body&& body) {
  try {
    return body();
  } catch (const Napi::Error&) {
    throw;  // thrown by JavaScript that the body called: a getter, a proxy
  } catch (...) {
    throw js_error(env, std::current_exception());
  }
}

// The same for functions that return a promise: they never throw, they reject.
// `body` gets the deferred and may settle it later, on this thread.
template <class Body>
Napi::Value guard_promise(Napi::Env env, Body&& body) {
  const Napi::Promise::Deferred deferred = Napi::Promise::Deferred::New(env);
  try {
    body(deferred);
  } catch (const Napi::Error& error) {
    deferred.Reject(error.Value());
  } catch (...) {
    deferred.Reject(js_error(env, std::current_exception()).Value());
  }
  return deferred.Promise();
}

}  // namespace turbomind::addon
