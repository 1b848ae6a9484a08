// Every option users can set, as the rest of the library sees them. LMDeploy's names in camelCase and
// LMDeploy's defaults: sampling settings in a model's generation_config.json are not taken over
// (its end-of-sequence ids are). No option is accepted and ignored. options/ owns the types, the
// rules of single values and the resolution of a pipeline's and of an answer's options.
import { GENERATION_RULES } from './options/generation-rules.js';
import { PIPELINE_RULES } from './options/pipeline-rules.js';

export type {
  GenerationOptions,
  LogitBias,
  LogitsProcessor,
  OutputRange,
  PromptOptions,
  ResolvedGenerationOptions,
} from './options/generation-options.js';
export type {
  ImageFetchOptions,
  PipelineOptions,
  QuantPolicy,
  ResolvedPipelineOptions,
  SpeculativeConfig,
} from './options/pipeline-options.js';
export { resolveGenerationOptions, resolvePromptOptions } from './options/resolve-generation.js';
export { resolvePipelineOptions } from './options/resolve-pipeline.js';
export type { TilingOptions } from './options/tiling.js';

/** Every option there is, by what takes it. */
export const OPTION_NAMES: {
  readonly pipeline: readonly string[];
  readonly generation: readonly string[];
} = { pipeline: Object.keys(PIPELINE_RULES), generation: Object.keys(GENERATION_RULES) };
