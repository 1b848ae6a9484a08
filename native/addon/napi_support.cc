#include "addon/napi_support.h"

#include <new>
#include <system_error>

namespace turbomind::addon {

Napi::Error js_error(Napi::Env env, ErrorCode code, const std::string& message) {
  Napi::Error error = Napi::Error::New(env, message);
  const std::string_view name = to_string(code);
  error.Set("code", Napi::String::New(env, name.data(), name.size()));
  return error;
}

Napi::Error js_error(Napi::Env env, const std::exception_ptr& exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const Error& error) {
    return js_error(env, error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return js_error(env, ErrorCode::out_of_memory, "the process ran out of memory");
  } catch (const std::system_error& error) {
    return js_error(env, ErrorCode::internal, format("the system refused: %s", error.what()));
  } catch (const std::exception& error) {
    return js_error(env, ErrorCode::internal, error.what());
  } catch (...) {
    return js_error(env, ErrorCode::internal, "an unknown native exception");
  }
}

}  // namespace turbomind::addon
