// What an engine reports of itself: counters, and its memory plan. Plain types; native/addon/
// convert_reports.cc fills them.

export interface NativeStats {
  readonly running: number;
  readonly waiting: number;
  readonly totalBlocks: number;
  readonly freeBlocks: number;
  readonly steps: number;
  /** Of the free ones, those that can still be found by their content. */
  readonly cachedBlocks: number;
  /** Prompt tokens of the requests that began. */
  readonly prefixQueries: number;
  /** Of these, found in the cache. */
  readonly prefixHits: number;
  readonly preemptions: number;
  /** Of the preemptions, those that saved blocks to host memory. */
  readonly swapsOut: number;
  /** Of these, those that have gone on with these blocks. */
  readonly swapsIn: number;
  /** Blocks that host memory has room for. */
  readonly swapBlocks: number;
  readonly freeSwapBlocks: number;
  /** How long steps took, in seconds: counts up to each bound, the last one past all of them. */
  readonly stepTimes: {
    readonly bounds: readonly number[];
    readonly counts: readonly number[];
    readonly sum: number;
  };
  readonly promptTokens: number;
  readonly completionTokens: number;
  /** Guesses of speculative decoding that ran. */
  readonly draftedTokens: number;
  /** Of these, those that were right: each saved a step of its sequence. */
  readonly acceptedTokens: number;
  readonly weightBytes: number;
  readonly kvCacheBytes: number;
  readonly workspaceBytes: number;
  readonly loadMs: number;
  readonly sessionLen: number;
  readonly deviceName: string;
  readonly deviceDescription: string;
}

/** The memory plan of a model on a device, in bytes where the name says so. */
export interface MemoryReport {
  readonly device: string;
  /** Free before anything was taken. */
  readonly freeBytes: number;
  readonly weightBytes: number;
  readonly visionWeightBytes: number;
  /** Of the largest step. */
  readonly activationBytes: number;
  readonly visionActivationBytes: number;
  /** Of the pictures of one full session: as many tiles are held at a time. */
  readonly imageEmbeddingBytes: number;
  readonly scratchBytes: number;
  readonly samplingBytes: number;
  /** Bound of what captured steps take. */
  readonly graphBytes: number;
  /** Kept for the driver and for unused ends of allocations. */
  readonly reserveBytes: number;
  readonly kvCacheBytes: number;
  /** All of the above together. */
  readonly totalBytes: number;
  /** Host memory of preempted requests; on the CPU part of totalBytes. */
  readonly hostSwapBytes: number;
  /** KV blocks that these hold. */
  readonly swapBlocks: number;
  /** Host memory of a GPU's staging buffers. */
  readonly hostStagingBytes: number;
  readonly kvBlockBytes: number;
  readonly kvBlocks: number;
  /** Tokens of a block. */
  readonly kvBlockTokens: number;
  /** 16: not quantised (f32 on the CPU). */
  readonly kvBits: number;
  /** Taken on the device now; 0 in an estimate. */
  readonly allocatedBytes: number;
  /** Free on the device when it had loaded, or last ran out of work; 0 in an estimate. */
  readonly deviceFreeBytes: number;
  /** What loading really took, by part; a part's plan and `reserveBytes` bound it. 0 in an estimate. */
  readonly use: {
    /** Weights and activations. */
    readonly decoderBytes: number;
    readonly visionBytes: number;
    /** Scratch and sampling. */
    readonly workspaceBytes: number;
    readonly kvCacheBytes: number;
    readonly imageEmbeddingBytes: number;
    readonly hostSwapBytes: number;
  };
}
