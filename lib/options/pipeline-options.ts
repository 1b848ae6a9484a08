// What users can set of a pipeline, with meanings and defaults, and the same with defaults filled in.
// Types only; what values are allowed is pipeline-rules.ts's, the defaults are put in by
// resolve-pipeline.ts.
import type { Device } from '../device.js';
import type { Tokenizer } from '../tokenizer.js';
import type { TilingOptions } from './tiling.js';

/** Limits of pictures named by URL. */
export interface ImageFetchOptions {
  /** Whole download, redirects included, in ms. Defaults to 30000. */
  readonly timeoutMs?: number | undefined;
  /** Encoded bytes of one picture, from wherever it comes. Defaults to 64 MiB. */
  readonly maxBytes?: number | undefined;
}

/** LMDeploy's `quant_policy`. */
export type QuantPolicy = 0 | 4 | 8;

/** Speculative decoding. It never changes results, only the time they take. */
export interface SpeculativeConfig {
  /**
   * 'ngram': what followed the last tokens when they stood in the prompt or completion before is
   * guessed to follow again, and guesses are checked several in a step, as many as have been found
   * to pay. 'none': one token a step.
   */
  readonly method: 'ngram' | 'none';
  /** Most guesses of a sequence in a step, 1 to 7; 'ngram' only. Defaults to 7. */
  readonly numSpeculativeTokens?: number | undefined;
}

/** Settings of a pipeline: its device, its memory and how pictures are cut. */
export interface PipelineOptions {
  /** 'auto' | 'cpu' | 'cuda' | 'cuda:N'. Defaults to 'auto'. */
  readonly device?: Device | undefined;
  /**
   * What activations and the KV cache are kept in on a GPU: 'auto' takes the checkpoint's own type
   * (bfloat16 where it has any such tensor, else float16). The CPU computes in float32: there
   * anything but 'auto' is refused. Defaults to 'auto'.
   */
  readonly dtype?: 'auto' | 'float16' | 'bfloat16' | undefined;
  /** CPU threads. Defaults to 0: as many as the process may use. */
  readonly threads?: number | undefined;
  /** Most tokens of prompt and completion together. Defaults to what the model was made for. */
  readonly sessionLen?: number | undefined;
  /** Most sequences in one step. Defaults to 128. */
  readonly maxBatchSize?: number | undefined;
  /** Most prompt tokens in one step. Defaults to 512 on the CPU, 8192 on a GPU. */
  readonly maxPrefillTokenNum?: number | undefined;
  /**
   * Share of the memory that weights and buffers leave free which the KV cache may take, up to 1;
   * 'auto': 0.9 on a GPU, half on the CPU. Never more than `maxBatchSize` full sessions. Defaults
   * to 0.8 on a GPU and to 0.5 on the CPU, whose memory others use too.
   */
  readonly cacheMaxEntryCount?: number | 'auto' | undefined;
  /** Bytes of the KV cache, down to whole blocks, instead of `cacheMaxEntryCount`. */
  readonly kvCacheBytes?: number | undefined;
  /** Bytes of everything on the device, instead of `cacheMaxEntryCount`. */
  readonly memoryBudgetBytes?: number | undefined;
  /**
   * Bytes of host memory that preempted requests may keep their KV blocks in, where copying them there
   * and back is cheaper than computing them again; 0: none. Taken at load. Defaults to 1 GiB, at most a
   * tenth of the free host memory, on a GPU; to 0 on the CPU, where the same bytes serve better as cache.
   */
  readonly swapSpaceBytes?: number | undefined;
  /** Tokens in a KV block. 64 is the only size implemented. */
  readonly cacheBlockSeqLen?: number | undefined;
  /**
   * Bits of a KV cache entry, 8 or 4, quantised per token and head; 0: not quantised (16 bit on a
   * GPU, 32 on the CPU). Defaults to 0.
   */
  readonly quantPolicy?: QuantPolicy | undefined;
  /**
   * Keeps what was computed of prompts and answers, as long as there is room, and does not compute
   * it again for requests that begin alike, pictures included. Results do not change. Defaults to true.
   */
  readonly enablePrefixCaching?: boolean | undefined;
  /** Requests that may wait for their first step; more are refused. Defaults to no limit. */
  readonly maxQueueSize?: number | undefined;
  /**
   * Goal for the time between the tokens of running streams, in ms: prompts are then computed in
   * smaller parts, at least 16 tokens a step. Defaults to none.
   */
  readonly maxInterTokenLatencyMs?: number | undefined;
  /** Defaults to `{ method: 'ngram' }`. */
  readonly speculativeConfig?: SpeculativeConfig | undefined;
  /** Devices a model is split over: 1 is the only number implemented. */
  readonly tp?: number | undefined;
  /** Fewest tiles of a picture's grid. Defaults to the model's own. */
  readonly minDynamicPatch?: number | undefined;
  /** Most tiles of a picture's grid, thumbnail not counted. Defaults to the model's own. */
  readonly maxDynamicPatch?: number | undefined;
  /** Whether a grid of several tiles gets the whole picture as one more. Defaults to the model's own. */
  readonly useThumbnail?: boolean | undefined;
  /** Most pixels of a picture, before any resize. Defaults to 100 million. */
  readonly maxImagePixels?: number | undefined;
  /** Limits of pictures named by URL. */
  readonly imageFetch?: ImageFetchOptions | undefined;
  /** A tokenizer to use instead of the folder's tokenizer.json. */
  readonly tokenizer?: Tokenizer | undefined;
  /** A Jinja chat template to use instead of the model's own. */
  readonly chatTemplate?: string | undefined;
  /** Aborts the loading: `pipeline()` rejects with `signal.reason`. */
  readonly signal?: AbortSignal | undefined;
  /** Gets the loaded share of the weights, 0..1. */
  readonly onProgress?: ((share: number) => void) | undefined;
  /** Caps the instruction set of the CPU kernels, for diagnosis. Results agree up to rounding. */
  readonly cpuIsa?: 'scalar' | 'avx2' | 'avx512' | 'amx' | undefined;
}

/** PipelineOptions with defaults filled in; what the model decides is left open. */
export interface ResolvedPipelineOptions {
  readonly device: Device;
  readonly dtype: 'auto' | 'float16' | 'bfloat16';
  readonly threads: number;
  readonly sessionLen: number;
  readonly maxBatchSize: number;
  /** undefined: what suits the device. */
  readonly maxPrefillTokenNum: number | undefined;
  /** 0: 'auto'; undefined: what suits the device. */
  readonly cacheMaxEntryCount: number | undefined;
  /** 0: not given. */
  readonly kvCacheBytes: number;
  /** 0: not given. */
  readonly memoryBudgetBytes: number;
  /** -1: what suits the device. */
  readonly swapSpaceBytes: number;
  readonly enablePrefixCaching: boolean;
  /** 0: no limit. */
  readonly maxQueueSize: number;
  /** 0: none. */
  readonly maxInterTokenLatencyMs: number;
  readonly quantPolicy: QuantPolicy;
  readonly blockSize: number;
  /** 0: no speculation. */
  readonly numSpeculativeTokens: number;
  readonly tiling: TilingOptions;
  readonly maxImagePixels: number;
  readonly fetchTimeoutMs: number;
  readonly maxImageBytes: number;
  readonly tokenizer: Tokenizer | undefined;
  readonly chatTemplate: string | undefined;
  readonly signal: AbortSignal | undefined;
  readonly onProgress: ((share: number) => void) | undefined;
  readonly cpuIsa: string;
}
