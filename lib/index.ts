// The public exports and nothing else.

export type { CallOptions } from './call.js';
export type { DecodeOptions } from './detokenizer.js';
export type { Device } from './device.js';
export type { LoadAttempt, TurbomindErrorCode } from './errors.js';
export { BackendNotFoundError, TurbomindError } from './errors.js';
export type { EstimateOptions } from './estimate.js';
export { estimate } from './estimate.js';
export type { HistogramSnapshot } from './histogram.js';
export type {
  ChatMessageInput,
  ChatRole,
  ContentPartInput,
  ImageSource,
  Prompt,
  PromptInput,
  RawImage,
  SharpLike,
  TextWithImages,
} from './messages.js';
export type { PipelineMetrics } from './metrics.js';
export type { MetricsRegistry, RegisterMetricsOptions } from './metrics-registry.js';
export type { MemoryReport, NativeStats } from './native-types.js';
export { pipeline } from './open-pipeline.js';
export type {
  GenerationOptions,
  ImageFetchOptions,
  LogitBias,
  LogitsProcessor,
  PipelineOptions,
  PromptOptions,
  QuantPolicy,
  SpeculativeConfig,
} from './options.js';
export { Pipeline } from './pipeline.js';
export type { PipelineInfo } from './pipeline-parts.js';
export type { EmbedOptions, GetPplOptions, RawPrompt } from './prompt-job.js';
export type {
  FinishReason,
  FloatRows,
  Response,
  StreamPart,
  Timings,
  TokenLogprobs,
} from './response.js';
export { ResponseStream } from './stream.js';
export type { JsonSchemaFormat, ResponseFormat } from './structured/response-format.js';
export type { Tokenizer } from './tokenizer.js';
