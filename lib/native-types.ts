// The whole contract of the native addon, as types; what a model is and what an engine reports of itself
// have files of their own. native/addon/*.cc implements it; lib/native.ts loads it; tests pass fakes.
import type { ModelSpec, TensorEntry } from './model-spec.js';
import type { MemoryReport, NativeStats } from './native-reports.js';

export type { DecoderSpec, ModelSpec, NativeDType, TensorEntry, VisionSpec } from './model-spec.js';
export type { MemoryReport, NativeStats } from './native-reports.js';

export interface NativeOpenOptions {
  readonly spec: ModelSpec;
  /** Absolute paths of the safetensors files. */
  readonly files: readonly string[];
  readonly tensors: readonly TensorEntry[];
  /** 'cpu' | 'cuda' | 'cuda:N'; 'auto' is resolved before. */
  readonly device: string;
  /** 'auto' | 'float16' | 'bfloat16'; on the CPU 'auto'. */
  readonly dtype: string;
  /** 0: as many as the process may use. */
  readonly threads: number;
  /** Tokens; 0: the model's maxPositionEmbeddings. */
  readonly sessionLen: number;
  readonly maxBatchSize: number;
  readonly maxPrefillTokenNum: number;
  readonly blockSize: number;
  /** Drafts of a sequence in a step, 0 to 7; 0: none. */
  readonly numSpeculativeTokens: number;
  /** 0: 'auto'. */
  readonly cacheMaxEntryCount: number;
  /** Bytes of the KV cache; 0: `cacheMaxEntryCount` decides. */
  readonly kvCacheBytes: number;
  /** Bytes of everything; 0: `cacheMaxEntryCount` decides. */
  readonly memoryBudgetBytes: number;
  /** Host memory for preempted requests; -1: what suits the device, 0: none. */
  readonly swapSpaceBytes: number;
  /** Plans as if the device had so many bytes free; 0: what it has. */
  readonly freeBytes: number;
  readonly enablePrefixCaching: boolean;
  /** Requests that may wait for their first step; 0: no limit. */
  readonly maxQueueSize: number;
  /** Goal for the time between tokens of running streams; 0: none. */
  readonly maxInterTokenLatencyMs: number;
  /** Bits of the KV cache: 8 or 4; 0: the device's unquantised format. */
  readonly quantPolicy: number;
  /** '' or a cap for tests: 'scalar' | 'avx2' | 'avx512' | 'amx'. */
  readonly cpuIsa: string;
  /** Path of the CUDA backend library; '' when there is none. */
  readonly cudaLibrary: string;
}

export interface NativeSampling {
  readonly doSample: boolean;
  readonly temperature: number;
  /** 0: no limit. */
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly repetitionPenalty: number;
  readonly frequencyPenalty: number;
  readonly presencePenalty: number;
  /** Each token at most once. */
  readonly logitBias: readonly (readonly [token: number, bias: number])[];
  /** Unsigned 64 bit. */
  readonly seed: bigint;
  readonly numLogprobs: number;
  readonly badWords: readonly (readonly number[])[];
}

/** Tiles of one image, held natively; opaque. */
export interface NativeTiles {
  readonly columns: number;
  readonly rows: number;
  /** Thumbnail counted. */
  readonly numTiles: number;
  readonly tileSize: number;
  /** Copy of the pixels, [numTiles, tileSize, tileSize, 3]. */
  pixels(): Uint8Array;
  /** 32 hex digits: grid, size and pixels, hashed as `hashBytes` does. */
  readonly contentHash: string;
}

export interface NativeTileOptions {
  readonly tileSize: number;
  readonly minTiles: number;
  readonly maxTiles: number;
  readonly useThumbnail: boolean;
}

export interface NativeRequest {
  readonly id: number;
  readonly promptTokens: Int32Array;
  readonly images: readonly {
    readonly tiles: NativeTiles;
    /** First of its image tokens in promptTokens. */
    readonly tokenOffset: number;
    readonly numTokens: number;
  }[];
  readonly sampling: NativeSampling;
  /** 0: the prompt is only computed, for its `outputs`. */
  readonly maxNewTokens: number;
  readonly minNewTokens: number;
  /** Higher first. Defaults to 0. */
  readonly priority?: number;
  /** Longest wait for the first step; 0, the default: for ever. */
  readonly queueTimeoutMs?: number;
  readonly stopTokenIds: readonly number[];
  /** Each token is drawn only once `setMask` was called for it. Defaults to false. */
  readonly guided?: boolean;
  /** The logits of each token come in an event and go back by `setLogits`. Defaults to false. */
  readonly editsLogits?: boolean;
  /** Defaults to none. */
  readonly outputs?: NativeOutputSpec;
}

/** native/runtime/request.h `OutputSpec`. */
export interface NativeOutputSpec {
  readonly logits: 'none' | 'generation' | 'all';
  readonly hiddenStates: 'none' | 'generation' | 'all';
  readonly pooling: 'none' | 'last' | 'mean';
  readonly promptNll: boolean;
}

/** native/runtime/request.h `RequestOutputs`. */
export interface NativeOutputs {
  /** [positions, V]; absent when there are none. */
  readonly logits?: Float32Array;
  /** [positions, H], after the last norm; absent when there are none. */
  readonly hiddenStates?: Float32Array;
  /** [H]; empty without pooling. */
  readonly pooled: readonly number[];
  /** -log p of the prompt's tokens from the second on, summed; natural logarithm. */
  readonly nll: number;
  /** How many tokens `nll` is the sum of. */
  readonly numNllTokens: number;
}

export interface NativeTimings {
  readonly queueMs: number;
  readonly visionMs: number;
  readonly prefillMs: number;
  readonly firstTokenMs: number;
  readonly decodeMs: number;
}

export interface NativeTokenEvent {
  readonly token: number;
  /** Present when numLogprobs > 0. */
  readonly logprob?: number;
  /** Best first. Present when numLogprobs > 0. */
  readonly topLogprobs?: readonly (readonly [token: number, logprob: number])[];
}

/** In order per request; the last one carries finishReason. The stop token is reported as a token. */
export interface NativeEvent {
  readonly id: number;
  readonly tokens: readonly NativeTokenEvent[];
  /** With `logits`: the token they are to be drawn from waits for `setLogits`. */
  readonly completionIdx?: number;
  /** [V]; `editsLogits` only. */
  readonly logits?: Float32Array;
  readonly finishReason?: 'stop' | 'length' | 'abort' | 'error';
  /** The stop id that ended it. */
  readonly matchedStop?: number;
  readonly timings?: NativeTimings;
  readonly numPreemptions?: number;
  /** Prompt tokens that were found in the cache. With the last event. */
  readonly cachedTokens?: number;
  /** With the last event, when the request has `outputs`. */
  readonly outputs?: NativeOutputs;
  /** finishReason 'error' only: an ERR_TM_ code and its message. */
  readonly errorCode?: string;
  readonly errorMessage?: string;
}

export interface NativeEngine {
  /** Answers a bad request with an error event; throws ERR_TM_DISPOSED after close. */
  submit(request: NativeRequest): void;
  abort(id: number): void;
  /**
   * Which tokens a `guided` request may draw as token `completionIdx` of its completion: bit i % 32
   * of word i / 32 allows token i, ids past the end are not allowed; null: all are. Copied. Call it
   * for 0 right after submit, and for i + 1 once token i was reported; the sooner, the less the
   * request waits. Passed over when the request has ended or the index is not its next one.
   */
  setMask(id: number, completionIdx: number, mask: Uint32Array | null): void;
  /** Answers an event with `logits`: [V], copied; a token is drawn from them at once. */
  setLogits(id: number, completionIdx: number, logits: Float32Array): void;
  stats(): NativeStats;
  memory(): MemoryReport;
  /** Aborts what runs, waits for native work, frees everything. Idempotent. */
  close(): Promise<void>;
  /** Logits of the token after the prompt, [V]; runs apart from the batch. */
  promptLogits(request: NativeRequest): Promise<Float32Array>;
}

export interface NativeCpuInfo {
  /** Best instruction set the kernels will use: 'scalar' | 'avx2' | 'avx512' | 'amx'. */
  readonly isa: string;
  /** Names such as 'avx2', 'fma', 'avx512_vnni', 'amx_int8'. */
  readonly features: readonly string[];
  readonly threads: number;
  readonly totalMemoryBytes: number;
  readonly freeMemoryBytes: number;
}

export interface NativeCudaQuery {
  readonly deviceCount: number;
  /** One line a device. */
  readonly devices: readonly string[];
  /** For each device '' or why the library cannot run on it. */
  readonly problems: readonly string[];
  /** '' or why no device can be used. */
  readonly error: string;
}

/**
 * What the .node file exports. Engine events arrive through `onEvents` on the JS thread, in
 * batches; `onProgress` gets the loaded share of the weights, 0..1. Errors carry `code`.
 */
export interface NativeAddon {
  readonly version: string;
  cpuInfo(): NativeCpuInfo;
  /** dlopens the CUDA backend library and asks it for devices. Call it in a child process. */
  queryCuda(libraryPath: string): NativeCudaQuery;
  open(
    options: NativeOpenOptions,
    onEvents: (events: readonly NativeEvent[]) => void,
    onProgress: (share: number) => void,
  ): Promise<NativeEngine>;
  /** The plan of `open` without loading: maps the files, reads no weights. */
  estimate(options: NativeOpenOptions): MemoryReport;
  /**
   * Cuts an image into tiles on native threads. channels: 1, 3 or 4. The pixels are read where they
   * are and kept from the garbage collector: until the promise settles they must neither be written
   * to nor be detached (transferred, resized).
   */
  makeTiles(
    pixels: Uint8Array,
    width: number,
    height: number,
    channels: number,
    options: NativeTileOptions,
  ): Promise<NativeTiles>;
  /**
   * A name for `previous` followed by these bytes, 32 hex digits: drawn anew by each process, so that
   * nobody can prepare bytes that share one. `previous`: the name of what comes before them, '' for
   * nothing. Returns when they are read, 10 GB in a second.
   */
  hashBytes(bytes: Uint8Array, previous: string): string;
  /** The grid that makeTiles would choose. */
  chooseGrid(
    width: number,
    height: number,
    options: NativeTileOptions,
  ): { columns: number; rows: number };
  /** Pillow's bicubic resize of RGB pixels; for tests and tools. */
  resizeBicubic(
    pixels: Uint8Array,
    width: number,
    height: number,
    outWidth: number,
    outHeight: number,
  ): Uint8Array;
}
