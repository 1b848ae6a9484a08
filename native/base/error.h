// The one exception type of the native side. Codes equal the `TurbomindErrorCode` union of
// lib/errors.ts (a test compares the two lists). A message names the thing, the value and the remedy.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

namespace turbomind {

enum class ErrorCode {
  invalid_argument,          // a value crossed the border with the wrong type or range
  invalid_config,            // a model spec that contradicts itself or is absurd
  invalid_checkpoint,        // a weight file that is truncated, overlapping or out of bounds
  missing_tensor,            // the model needs a tensor that the checkpoint does not hold
  tensor_mismatch,           // a tensor has another shape or dtype than the model needs
  unsupported_model,         // architecture or block shape that is not implemented
  unsupported_quantization,  // quantisation format or group size that is not implemented
  unsupported_device,        // the device named does not exist or cannot run this build
  invalid_image,             // pixels that cannot be cut into tiles
  prompt_too_long,           // the prompt does not fit into session_len
  queue_full,                // more requests wait than the owner allows
  deadline,                  // a request waited longer than its caller allows
  out_of_memory,             // a budget or an allocation that does not hold the model
  device_error,              // the device failed while running
  disposed,                  // the engine was closed
  internal                   // a broken invariant: a bug of ours
};

// "ERR_TM_INVALID_ARGUMENT" and so on; what JavaScript sees as `error.code`.
std::string_view to_string(ErrorCode code);

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

[[noreturn]] void fail_check(std::string_view condition, const std::string& message,
                             std::source_location where = std::source_location::current());

// printf-style text; every message of the native side is built with it.
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace turbomind

// Guards an invariant in all builds; throws Error{internal}.
#define TM_CHECK(condition, ...)                                                             \
  do {                                                                                       \
    if (!(condition)) ::turbomind::fail_check(#condition, ::turbomind::format(__VA_ARGS__)); \
  } while (false)
