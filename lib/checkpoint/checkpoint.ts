// Opens a Hugging Face model folder: config files, tensor table, chat template. Reads headers
// only, never weights; runs on the JS thread with asynchronous file reads.

import { TurbomindError } from '../errors.js';
import type { ModelSpec, NativeDType, TensorEntry } from '../native-types.js';

/** How pictures become tiles and tokens; absent for text models. */
export interface ImageSettings {
  /** Side of a tile in pixels. */
  readonly tileSize: number;
  readonly tokensPerTile: number;
  readonly minDynamicPatch: number;
  readonly maxDynamicPatch: number;
  readonly useThumbnail: boolean;
  /** '<img>' */
  readonly startToken: string;
  /** '</img>' */
  readonly endToken: string;
  /** '<IMG_CONTEXT>': the prompt token that an image embedding replaces. */
  readonly contextToken: string;
}

/** generation_config.json: what the model's authors recommend. Absent fields were not given. */
export interface GenerationDefaults {
  readonly eosTokenIds: readonly number[];
  readonly doSample?: boolean;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly repetitionPenalty?: number;
  readonly maxNewTokens?: number;
}

/** Where the chat format comes from. */
export type ChatTemplateSource =
  | { readonly type: 'jinja'; readonly file: string; readonly template: string }
  | { readonly type: 'named'; readonly name: string };

/** Sums for `inspect`. */
export interface CheckpointTotals {
  /** Weights as the model counts them: a packed 4-bit word is eight. */
  readonly parameters: number;
  /** Bytes of the tensors the model uses. */
  readonly bytes: number;
  readonly bytesByDType: Readonly<Partial<Record<NativeDType, number>>>;
  /** Tensors in the files that the model does not use. */
  readonly unusedTensors: number;
}

/** A model folder, understood. */
export interface Checkpoint {
  /** Absolute path. */
  readonly folder: string;
  /** `architectures[0]` of config.json. */
  readonly architecture: string;
  readonly spec: ModelSpec;
  /** Absolute paths of the safetensors files that hold used tensors. */
  readonly files: readonly string[];
  readonly tensors: readonly TensorEntry[];
  readonly image?: ImageSettings;
  readonly generation: GenerationDefaults;
  readonly chatTemplate?: ChatTemplateSource;
  readonly maxPositionEmbeddings: number;
  readonly totals: CheckpointTotals;
  /** tokenizer_config.json, {} when absent. */
  readonly tokenizerConfig: Readonly<Record<string, unknown>>;
}

/** Opens a model folder. */
export function openCheckpoint(folder: string): Promise<Checkpoint> {
  throw new TurbomindError('ERR_TM_INTERNAL', `openCheckpoint(${folder}) is being written`);
}
