// Text ↔ token ids behind one interface. Wraps the tokenizer library, which is built on first
// use because a 151k vocabulary takes half a second. Runs on the JS thread.

import type { Checkpoint } from './checkpoint/checkpoint.js';
import { TurbomindError } from './errors.js';

export interface EncodeOptions {
  /** Add what the tokenizer's post-processor adds (a BOS token, mostly). Default false. */
  readonly addSpecialTokens?: boolean;
}

export interface Tokenizer {
  /** Text to ids. Added tokens written in the text become their ids. */
  encode(text: string, options?: EncodeOptions): number[];
  /** Text to ids with no special token recognised: `<|im_end|>` is ten characters. */
  encodeLiteral(text: string): number[];
  /** Ids from 0 to vocabSize - 1 have tokens. */
  readonly vocabSize: number;
  idOf(token: string): number | undefined;
  /** UTF-8 bytes of a token, maybe part of a character; empty for an id without a token. */
  bytesOf(id: number): Uint8Array;
  /** Text of a token whose bytes are whole characters; undefined otherwise. */
  textOf(id: number): string | undefined;
  isSpecial(id: number): boolean;
  /** Ids that end an answer: generation_config, the tokenizer's eos token, the chat format's. */
  readonly eosIds: readonly number[];
  /** Builds what encode and decode need (0.1-0.6 s for a large vocabulary); else done on first use. */
  prepare(): void;
}

/** Reads and parses tokenizer.json. Start it after the native load, with which it overlaps. */
export function loadTokenizer(checkpoint: Checkpoint): Promise<Tokenizer> {
  throw new TurbomindError('ERR_TM_INTERNAL', `loadTokenizer(${checkpoint.folder})`);
}
