// What a model family is: config fields → our terms, and the list of tensors with their names in
// the checkpoint. Adding a family is one file beside this one and one row in index.ts.

import type { DecoderSpec, VisionSpec } from '../../native-types.js';
import type { ConfigReader } from '../config.js';

/** What a family may look at. */
export interface FamilyInput {
  /** config.json */
  readonly config: ConfigReader;
  /** preprocessor_config.json, or its part of processor_config.json. */
  readonly preprocessor?: ConfigReader;
  /** Whether the files hold a tensor: layouts differ in prefixes and in stored heads. */
  hasTensor(name: string): boolean;
}

/** Rows [first, first + shape[0]) of a stored tensor of `total` rows: a part of a fused one. */
export interface RowRange {
  readonly first: number;
  readonly total: number;
}

/** One tensor that native code needs. */
export interface TensorRule {
  readonly type: 'tensor';
  /** Canonical name (native/models/canonical_names.md). */
  readonly name: string;
  /** Name in the checkpoint. */
  readonly source: string;
  readonly shape: readonly number[];
  readonly rows?: RowRange;
}

/** A linear layer [n, k]: `.weight`, or `.qweight`/`.qzeros`/`.scales` when the file has those. */
export interface LinearRule {
  readonly type: 'linear';
  /** Canonical name without `.weight`. */
  readonly name: string;
  /** Name in the checkpoint without `.weight`. */
  readonly source: string;
  /** Outputs. */
  readonly n: number;
  /** Inputs. */
  readonly k: number;
  readonly hasBias: boolean;
}

export type WeightRule = TensorRule | LinearRule;

/** How the pictures of a vision model are cut. */
export interface TilingDefaults {
  readonly minDynamicPatch: number;
  readonly maxDynamicPatch: number;
  readonly useThumbnail: boolean;
}

export interface VisionPart {
  readonly spec: VisionSpec;
  readonly tiling: TilingDefaults;
  /** The id of `<IMG_CONTEXT>` by config.json, where it says one. */
  readonly imageTokenId?: number;
}

/** A model folder as its family understands it. */
export interface FamilyModel {
  readonly decoder: DecoderSpec;
  readonly vision?: VisionPart;
  readonly weights: readonly WeightRule[];
  /** Configs in which to look for `quantization_config` and token ids, outermost first. */
  readonly configs: readonly ConfigReader[];
  /** Name of a chat format that the checkpoint refers to instead of carrying a template. */
  readonly templateName?: string;
}

export interface ModelFamily {
  /** Values of `architectures[0]` that this family reads. */
  readonly architectures: readonly string[];
  read(input: FamilyInput): FamilyModel;
}

/** A decoder-only language model, alone or inside a vision-language model. */
export interface DecoderFamily {
  readonly architecture: string;
  /** `model_type`, for inner configs without `architectures`. */
  readonly modelType: string;
  /** Everything but `tiedEmbeddings`, which depends on the layout around the decoder. */
  readDecoder(config: ConfigReader): Omit<DecoderSpec, 'tiedEmbeddings'>;
}

export function tensor(name: string, source: string, shape: readonly number[]): TensorRule {
  return { type: 'tensor', name, source, shape };
}

/** The first prefix under which the files hold `probe`; the first of all when none does. */
export function findPrefix(
  input: FamilyInput,
  prefixes: readonly [string, ...string[]],
  probe: string,
): string {
  return prefixes.find((prefix) => input.hasTensor(prefix + probe)) ?? prefixes[0];
}
