// Token ids to text, one by one: never half a character, and never text behind a stop string.
// Runs on the JS thread; one object per request.

import { TurbomindError } from './errors.js';
import type { Tokenizer } from './tokenizer.js';

export interface DetokenizerOptions {
  /** Leave out special tokens. Default true. */
  readonly skipSpecialTokens?: boolean;
}

export interface StopMatch {
  /** The stop string that was found. */
  readonly stop: string;
  /** Index, among the tokens pushed, of the token that completed it. */
  readonly tokenIndex: number;
}

export interface TextPiece {
  /** Text that can be shown now; '' while characters are held back. */
  readonly text: string;
  readonly match?: StopMatch;
}

/** Ids in, text out, ending before the first stop string. */
export class TextStream {
  constructor(
    tokenizer: Tokenizer,
    options?: DetokenizerOptions & { stopStrings?: readonly string[] },
  ) {
    throw new TurbomindError('ERR_TM_INTERNAL', `${typeof tokenizer} ${typeof options}`);
  }
  /** After a match every further push returns ''. */
  push(id: number): TextPiece {
    throw new TurbomindError('ERR_TM_INTERNAL', `${id}`);
  }
  /** What was held back, at the end of the answer. */
  flush(): TextPiece {
    throw new TurbomindError('ERR_TM_INTERNAL', 'flush');
  }
}
