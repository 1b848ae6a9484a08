// What native code needs to know of a model: plain types, filled by lib/checkpoint/ and read by
// native/addon/convert_options.cc.

/** Element types of checkpoint tensors the native side reads. */
export type NativeDType = 'f32' | 'f16' | 'bf16' | 'i32';

/** native/models/model_spec.h `DecoderSpec`, field by field. */
export interface DecoderSpec {
  readonly hiddenSize: number;
  readonly numLayers: number;
  readonly numHeads: number;
  readonly numKvHeads: number;
  readonly headDim: number;
  readonly intermediateSize: number;
  readonly vocabSize: number;
  readonly maxPositionEmbeddings: number;
  readonly normEps: number;
  readonly ropeTheta: number;
  readonly qkvBias: boolean;
  readonly qkNorm: boolean;
  readonly tiedEmbeddings: boolean;
}

/** native/models/model_spec.h `VisionSpec`. */
export interface VisionSpec {
  readonly imageSize: number;
  readonly patchSize: number;
  readonly hiddenSize: number;
  readonly numLayers: number;
  readonly numHeads: number;
  readonly intermediateSize: number;
  readonly normEps: number;
  readonly rmsNorm: boolean;
  readonly qkvBias: boolean;
  readonly qkNorm: boolean;
  readonly shuffleFactor: number;
  readonly projectorNormEps: number;
  readonly mean: readonly [number, number, number];
  readonly std: readonly [number, number, number];
}

/** native/models/model_spec.h `ModelSpec`. */
export interface ModelSpec {
  readonly decoder: DecoderSpec;
  readonly vision?: VisionSpec;
  readonly quant: { readonly method: 'none' | 'awq'; readonly groupSize: number };
  /** Id that image embeddings replace; -1 for text models. */
  readonly imageTokenId: number;
}

/** One tensor under its canonical name (native/models/canonical_names.md). */
export interface TensorEntry {
  readonly name: string;
  readonly dtype: NativeDType;
  readonly shape: readonly number[];
  /** Index into `NativeOpenOptions.files`. */
  readonly file: number;
  /** Bytes from the start of the file. */
  readonly offset: number;
  readonly bytes: number;
}
