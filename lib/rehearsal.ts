// What a pipeline does before its first caller comes: whole calls to an engine that answers at once, so
// that templates, patterns, encoders, options, events and text are compiled while the real engine opens.
// Nothing of it is left: router and counters are its own, and no picture or grammar is involved.
// Runs on the JS thread.
import { Call } from './call.js';
import { collect } from './collect.js';
import { TurbomindError } from './errors.js';
import type { NativeEngine, NativeEvent, NativeRequest } from './native-types.js';
import { createPreparer, type PipelineParts } from './pipeline-parts.js';
import { EventRouter } from './router.js';
import { GrammarService } from './structured/grammar-service.js';

// Functions get their fast code in several steps: a call or two is not enough, ten gain nothing more.
const CALLS = 4;
const SENTENCE = 'What can you do? List 3 things, briefly: 1. read 2. write 3. see.\n';
const PROMPT = SENTENCE.repeat(8) + 'abcdefghijklmnopqrstuvwxyz'.repeat(16);
const NUM_TOKENS = 8;

/** The parts of the pipeline to come, as far as they are there before its engine is. */
export type RehearsalParts = Omit<PipelineParts, 'engine' | 'router'>;

/** Takes some milliseconds of the JS thread, in slices. */
export async function rehearse(parts: RehearsalParts): Promise<void> {
  performance.now(); // Node loads a module for the first reading of its clock
  const { tokenizer, checkpoint } = parts;
  const { vocabSize, hiddenSize, maxPositionEmbeddings } = checkpoint.spec.decoder;
  const router = new EventRouter();
  router.attach(new EchoEngine(router.onEvents));
  const context = {
    router,
    tokenizer,
    preparer: createPreparer(parts, maxPositionEmbeddings),
    sizes: { vocabSize, hiddenSize },
    grammars: new GrammarService({ tokenizer, vocabSize, startWorker: unexpected }),
  };
  for (let i = 0; i < CALLS; i += 1) {
    // Where a model refuses this prompt, so does the response; who asks with another is told what is wrong.
    await collect(new Call(context, PROMPT, { maxNewTokens: NUM_TOKENS }));
  }
}

/** Answers with the first tokens of the prompt. */
class EchoEngine implements NativeEngine {
  readonly #emit: (events: readonly NativeEvent[]) => void;

  constructor(emit: (events: readonly NativeEvent[]) => void) {
    this.#emit = emit;
  }

  submit({ id, promptTokens }: NativeRequest): void {
    queueMicrotask(() => {
      for (const token of promptTokens.subarray(0, NUM_TOKENS)) {
        this.#emit([{ id, tokens: [{ token }] }]);
      }
      this.#emit([{ id, tokens: [], finishReason: 'length' }]);
    });
  }

  abort(): void {}
  setMask(): void {}
  setLogits(): void {}
  stats(): never {
    return unexpected();
  }
  memory(): never {
    return unexpected();
  }
  async close(): Promise<void> {}
  async promptLogits(): Promise<Float32Array> {
    return unexpected();
  }
}

function unexpected(): never {
  throw new TurbomindError('ERR_TM_INTERNAL', 'a rehearsal asks for text alone');
}
