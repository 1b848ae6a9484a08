// The one error class users see. Codes are a literal union; the native list is
// native/base/error.h and a test compares the two.

/** Codes that native code can raise (native/base/error.cc holds the same list). */
export const NATIVE_ERROR_CODES = [
  'ERR_TM_INVALID_ARGUMENT',
  'ERR_TM_INVALID_CONFIG',
  'ERR_TM_INVALID_CHECKPOINT',
  'ERR_TM_MISSING_TENSOR',
  'ERR_TM_TENSOR_MISMATCH',
  'ERR_TM_UNSUPPORTED_MODEL',
  'ERR_TM_UNSUPPORTED_QUANTIZATION',
  'ERR_TM_UNSUPPORTED_DEVICE',
  'ERR_TM_INVALID_IMAGE',
  'ERR_TM_PROMPT_TOO_LONG',
  'ERR_TM_QUEUE_FULL',
  'ERR_TM_DEADLINE',
  'ERR_TM_OUT_OF_MEMORY',
  'ERR_TM_DEVICE_ERROR',
  'ERR_TM_DISPOSED',
  'ERR_TM_INTERNAL',
] as const;

/** Codes raised by the TypeScript side alone. */
export const LIB_ERROR_CODES = [
  'ERR_TM_INVALID_OPTION',
  'ERR_TM_INVALID_PROMPT',
  'ERR_TM_MODEL_NOT_FOUND',
  'ERR_TM_INVALID_TOKENIZER',
  'ERR_TM_INVALID_TEMPLATE',
  'ERR_TM_IMAGE_FETCH',
  'ERR_TM_LOGITS_PROCESSOR',
  'ERR_TM_BACKEND_NOT_FOUND',
] as const;

export type TurbomindErrorCode =
  | (typeof NATIVE_ERROR_CODES)[number]
  | (typeof LIB_ERROR_CODES)[number];

/**
 * Every failure of this package. `code` is stable; `message` names the thing, the value and the
 * remedy; `cause` holds what lies beneath.
 */
export class TurbomindError extends Error {
  readonly code: TurbomindErrorCode;

  constructor(code: TurbomindErrorCode, message: string, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'TurbomindError';
    this.code = code;
  }
}

/** One candidate binary and why it could not be used. */
export interface LoadAttempt {
  readonly path: string;
  readonly reason: string;
}

/** No native binary could be loaded; `attempts` lists each candidate with its reason. */
export class BackendNotFoundError extends TurbomindError {
  readonly attempts: readonly LoadAttempt[];

  constructor(message: string, attempts: readonly LoadAttempt[]) {
    super('ERR_TM_BACKEND_NOT_FOUND', message);
    this.name = 'BackendNotFoundError';
    this.attempts = attempts;
  }
}
