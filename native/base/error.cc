#include "base/error.h"

#include <cstdarg>
#include <cstdio>

namespace turbomind {

std::string_view to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "ERR_TM_INVALID_ARGUMENT";
    case ErrorCode::invalid_config:
      return "ERR_TM_INVALID_CONFIG";
    case ErrorCode::invalid_checkpoint:
      return "ERR_TM_INVALID_CHECKPOINT";
    case ErrorCode::missing_tensor:
      return "ERR_TM_MISSING_TENSOR";
    case ErrorCode::tensor_mismatch:
      return "ERR_TM_TENSOR_MISMATCH";
    case ErrorCode::unsupported_model:
      return "ERR_TM_UNSUPPORTED_MODEL";
    case ErrorCode::unsupported_quantization:
      return "ERR_TM_UNSUPPORTED_QUANTIZATION";
    case ErrorCode::unsupported_device:
      return "ERR_TM_UNSUPPORTED_DEVICE";
    case ErrorCode::invalid_image:
      return "ERR_TM_INVALID_IMAGE";
    case ErrorCode::prompt_too_long:
      return "ERR_TM_PROMPT_TOO_LONG";
    case ErrorCode::queue_full:
      return "ERR_TM_QUEUE_FULL";
    case ErrorCode::deadline:
      return "ERR_TM_DEADLINE";
    case ErrorCode::out_of_memory:
      return "ERR_TM_OUT_OF_MEMORY";
    case ErrorCode::device_error:
      return "ERR_TM_DEVICE_ERROR";
    case ErrorCode::disposed:
      return "ERR_TM_DISPOSED";
    case ErrorCode::internal:
      return "ERR_TM_INTERNAL";
  }
  return "ERR_TM_INTERNAL";
}

void fail_check(std::string_view condition, const std::string& message,
                std::source_location where) {
  throw Error(ErrorCode::internal, format("%s (check `%.*s` failed at %s:%u; please report this)",
                                          message.c_str(), static_cast<int>(condition.size()),
                                          condition.data(), where.file_name(), where.line()));
}

std::string format(const char* pattern, ...) {
  va_list args;
  va_start(args, pattern);
  va_list copy;
  va_copy(copy, args);
  const int length = std::vsnprintf(nullptr, 0, pattern, copy);
  va_end(copy);
  std::string text(length > 0 ? static_cast<size_t>(length) : 0, '\0');
  if (length > 0) std::vsnprintf(text.data(), text.size() + 1, pattern, args);
  va_end(args);
  return text;
}

}  // namespace turbomind
