// Messages to prompt ids: renders the chat template, encodes it, and grows each image placeholder
// to its image tokens. Runs on the JS thread.

import type { Checkpoint } from './checkpoint/checkpoint.js';
import { TurbomindError } from './errors.js';
import type { ChatMessage } from './messages.js';
import type { Tokenizer } from './tokenizer.js';

export interface RenderOptions {
  /** End the prompt where the model's answer begins. Default true. */
  readonly addGenerationPrompt?: boolean;
  /** More variables for the template, such as `enable_thinking`. */
  readonly variables?: Readonly<Record<string, unknown>>;
}

export interface ImageSpan {
  /** First image token in `ids`. */
  readonly tokenOffset: number;
  readonly numTokens: number;
}

export interface BuiltPrompt {
  readonly ids: Int32Array;
  /** One an image, in order. */
  readonly imageSpans: readonly ImageSpan[];
  /** The prompt with one placeholder an image. */
  readonly text: string;
}

/** Compiles a model's chat format once. */
export class PromptBuilder {
  constructor(checkpoint: Checkpoint, tokenizer: Tokenizer) {
    throw new TurbomindError('ERR_TM_INTERNAL', `${checkpoint.folder} ${tokenizer.vocabSize}`);
  }
  /** Prompt text, one placeholder an image. */
  render(messages: readonly ChatMessage[], options?: RenderOptions): string {
    throw new TurbomindError('ERR_TM_INTERNAL', `${messages.length} ${typeof options}`);
  }
  /** @param tilesPerImage tiles of each image, thumbnail counted, in order of appearance. */
  build(
    messages: readonly ChatMessage[],
    tilesPerImage: readonly number[],
    options?: RenderOptions,
  ): BuiltPrompt {
    throw new TurbomindError(
      'ERR_TM_INTERNAL',
      `${messages.length} ${tilesPerImage.length} ${typeof options}`,
    );
  }
}

/** `new PromptBuilder(checkpoint, tokenizer).build(messages, tilesPerImage, options)`. */
export function buildPrompt(
  checkpoint: Checkpoint,
  tokenizer: Tokenizer,
  messages: readonly ChatMessage[],
  tilesPerImage: readonly number[],
  options?: RenderOptions,
): BuiltPrompt {
  return new PromptBuilder(checkpoint, tokenizer).build(messages, tilesPerImage, options);
}
