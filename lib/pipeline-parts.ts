// What an open pipeline is made of, what it tells of that, and how the parts become the one that
// prepares its requests. Opening and closing them is left to open-pipeline.ts and pipeline.ts.
import type { PromptBuilder } from './chat.js';
import type { Checkpoint } from './checkpoint/checkpoint.js';
import type { NativeAddon, NativeEngine } from './native-types.js';
import type { ResolvedPipelineOptions } from './options.js';
import { RequestPreparer } from './prepare.js';
import type { EventRouter } from './router.js';
import type { StartWorker } from './structured/worker-port.js';
import type { Tokenizer } from './tokenizer.js';

/** Facts about an open pipeline. */
export interface PipelineInfo {
  /** Absolute path of the model folder. */
  readonly model: string;
  readonly architecture: string;
  readonly device: string;
  /** Tokens of prompt and completion together. */
  readonly sessionLen: number;
  readonly parameters: number;
  /** 'none' or 'awq'. */
  readonly quantization: string;
  readonly hasVision: boolean;
}

/** What an open pipeline is made of; tests hand in fakes. */
export interface PipelineParts {
  readonly addon: NativeAddon;
  readonly engine: NativeEngine;
  readonly router: EventRouter;
  readonly checkpoint: Checkpoint;
  readonly tokenizer: Tokenizer;
  /** Of `checkpoint` and `tokenizer`; the rehearsal and the pipeline have one. */
  readonly promptBuilder: PromptBuilder;
  readonly options: ResolvedPipelineOptions;
  /** Starts grammar workers; the package's own by default. */
  readonly startWorker?: StartWorker;
}

/** Facts that do not change while the pipeline is open. */
export function pipelineInfo({ checkpoint, engine }: PipelineParts): PipelineInfo {
  const stats = engine.stats();
  return {
    model: checkpoint.folder,
    architecture: checkpoint.architecture,
    device: stats.deviceName,
    sessionLen: stats.sessionLen,
    parameters: checkpoint.totals.parameters,
    quantization: checkpoint.spec.quant.method,
    hasVision: checkpoint.image !== undefined,
  };
}

/** What prepares the requests of these parts. `sessionLen`: tokens of prompt and completion. */
export function createPreparer(
  parts: Omit<PipelineParts, 'engine' | 'router'>,
  sessionLen: number,
): RequestPreparer {
  const { addon, checkpoint, tokenizer, promptBuilder, options } = parts;
  return new RequestPreparer({
    addon,
    tokenizer,
    promptBuilder,
    image: checkpoint.image,
    tiling: options.tiling,
    imageLimits: {
      maxPixels: options.maxImagePixels,
      maxBytes: options.maxImageBytes,
      timeoutMs: options.fetchTimeoutMs,
    },
    sessionLen,
    vocabSize: checkpoint.spec.decoder.vocabSize,
  });
}
