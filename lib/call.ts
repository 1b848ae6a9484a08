// One call of a pipeline: a prompt or a batch, prepared, submitted together and collected. Shared
// by the promise form and the stream form. Runs on the JS thread.
import { Completion, type CompletionListener, type OutputSizes } from './completion.js';
import { TurbomindError } from './errors.js';
import {
  type ChatMessage,
  isMessageLike,
  normalizePrompts,
  type Prompt,
  type PromptInput,
} from './messages.js';
import { fromNative } from './native.js';
import {
  type GenerationOptions,
  type ResolvedGenerationOptions,
  resolveGenerationOptions,
} from './options.js';
import type { RequestPreparer } from './prepare.js';
import type { EventRouter, Submitted } from './router.js';
import type { StreamSource } from './stream.js';
import type { GrammarService } from './structured/grammar-service.js';
import type { GrammarSession } from './structured/grammar-session.js';
import type { Tokenizer } from './tokenizer.js';

/** One set of options for all prompts, or one a prompt. */
export type CallOptions = GenerationOptions | readonly GenerationOptions[];

export interface CallContext {
  readonly router: EventRouter;
  readonly preparer: RequestPreparer;
  readonly tokenizer: Tokenizer;
  readonly sizes: OutputSizes;
  readonly grammars: GrammarService;
}

interface Item {
  readonly options: ResolvedGenerationOptions;
  /** The conversation, or why this prompt of a batch has none. */
  readonly conversation: readonly ChatMessage[] | TurbomindError;
}

export class Call implements StreamSource {
  readonly #context: CallContext;
  readonly #prompt: PromptInput;
  readonly #options: CallOptions;
  readonly #startedAt = performance.now();
  readonly #submitted: Submitted[] = [];
  readonly #unlisten: (() => void)[] = [];
  #isBatch = false;
  #isAborted = false;
  #unfinished = 0;

  constructor(context: CallContext, prompt: PromptInput, options: CallOptions) {
    this.#context = context;
    this.#prompt = prompt;
    this.#options = options;
  }

  isBatch(): boolean {
    return this.#isBatch;
  }

  /** Prepares and submits all prompts; resolves with the number of answers. Rejects for the whole call. */
  async start(listener: CompletionListener): Promise<number> {
    const items = this.#readItems();
    const total = items.reduce((sum, { options }) => sum + options.n, 0);
    this.#unfinished = total;
    const watched: CompletionListener = {
      updated: (completion) => listener.updated(completion),
      finished: (completion) => {
        this.#noteEnd();
        listener.finished(completion);
      },
      failed: (reason) => {
        this.abort();
        listener.failed(reason);
      },
    };
    this.#listen(items, watched);
    await Promise.all(items.map((item, index) => this.#startItem(item, index, watched)));
    return total;
  }

  /** Ends what still runs, without a response. */
  abort(): void {
    this.#isAborted = true;
    this.#stopListening();
    for (const request of this.#submitted) request.abort();
  }

  #readItems(): Item[] {
    const { router } = this.#context;
    void router.engine; // a closed pipeline says so before it judges the prompt
    const { conversations, isBatch } = readConversations(this.#prompt);
    this.#isBatch = isBatch;
    const options = readOptions(this.#options, conversations.length, isBatch);
    return conversations.map((conversation, index) => {
      const own = options.length === 1 ? options[0] : options[index];
      return { conversation, options: own ?? resolveGenerationOptions() };
    });
  }

  #listen(items: readonly Item[], listener: CompletionListener): void {
    for (const signal of new Set(items.map((item) => item.options.signal))) {
      if (signal === undefined) continue;
      signal.throwIfAborted();
      const onAbort = (): void => listener.failed(signal.reason);
      signal.addEventListener('abort', onAbort, { once: true });
      this.#unlisten.push(() => signal.removeEventListener('abort', onAbort));
    }
  }

  async #startItem(item: Item, index: number, listener: CompletionListener): Promise<void> {
    const { options, conversation } = item;
    const { router, preparer } = this.#context;
    const completions = this.#completions(index, options, listener);
    try {
      if (conversation instanceof TurbomindError) throw conversation;
      const request = await preparer.prepare(conversation, options);
      const grammars = await this.#openGrammars(options, request.stopTokenIds);
      if (this.#isAborted) {
        for (const grammar of grammars) grammar.close();
        return;
      }
      for (const completion of completions) {
        const sampling = { ...request.sampling, seed: seedOf(options.seed, completion.choice) };
        this.#submitted.push(router.submit(completion, { ...request, sampling }, grammars.shift()));
      }
    } catch (error) {
      if (this.#isAborted) return;
      const known = fromNative(error);
      router.metrics.failed(known.code);
      // A closed pipeline is not the fault of one prompt.
      if (known.code === 'ERR_TM_DISPOSED') listener.failed(known);
      else for (const completion of completions) completion.failWith(known);
    }
  }

  // One session for each answer; the grammar itself is compiled once.
  async #openGrammars(
    { grammar, n }: ResolvedGenerationOptions,
    stopTokenIds: readonly number[],
  ): Promise<GrammarSession[]> {
    if (grammar === undefined) return [];
    const { grammars, tokenizer } = this.#context;
    const stopIds = stopTokenIds.filter((id) => {
      return tokenizer.eosIds.includes(id) || tokenizer.isSpecial(id);
    });
    if (stopIds.length === 0) {
      throw new TurbomindError(
        'ERR_TM_INVALID_OPTION',
        'responseFormat: none of the stop tokens is a special one, so the answer could not end',
      );
    }
    const opening = Array.from({ length: n }, () => grammars.open(grammar, stopIds));
    const settled = await Promise.allSettled(opening);
    try {
      return await Promise.all(opening);
    } catch (error) {
      for (const each of settled) if (each.status === 'fulfilled') each.value.close();
      throw error;
    }
  }

  #completions(
    index: number,
    options: ResolvedGenerationOptions,
    listener: CompletionListener,
  ): Completion[] {
    const { tokenizer, sizes } = this.#context;
    return Array.from({ length: options.n }, (_, choice) => {
      const place = { index, choice };
      return new Completion(place, this.#startedAt, tokenizer, options, sizes, listener);
    });
  }

  #noteEnd(): void {
    this.#unfinished -= 1;
    if (this.#unfinished === 0) this.#stopListening();
  }

  #stopListening(): void {
    for (const unlisten of this.#unlisten.splice(0)) unlisten();
  }
}

// One malformed prompt of a batch must not destroy the others.
function readConversations(prompt: PromptInput): {
  readonly conversations: readonly (readonly ChatMessage[] | TurbomindError)[];
  readonly isBatch: boolean;
} {
  try {
    return normalizePrompts(prompt);
  } catch (error) {
    const items: unknown = prompt;
    if (!Array.isArray(items) || items.length < 2 || items.some(isMessageLike)) throw error;
    const conversations = items.map((item, index) => readOne(item, index));
    // All of them malformed: the form of the call is the mistake.
    if (conversations.every((each) => each instanceof TurbomindError)) throw error;
    return { conversations, isBatch: true };
  }
}

// Choice i of a prompt is what the prompt alone answers with the seed + i.
function seedOf(seed: bigint, choice: number): bigint {
  return BigInt.asUintN(64, seed + BigInt(choice));
}

function readOne(prompt: Prompt, index: number): readonly ChatMessage[] | TurbomindError {
  try {
    return normalizePrompts([prompt]).conversations[0] ?? [];
  } catch (error) {
    if (!(error instanceof TurbomindError)) throw error;
    return new TurbomindError(error.code, error.message.replace('prompt[0]', `prompt[${index}]`));
  }
}

function readOptions(
  options: CallOptions,
  numPrompts: number,
  isBatch: boolean,
): ResolvedGenerationOptions[] {
  if (!isList(options)) return [resolveGenerationOptions(options)];
  if (!isBatch || options.length !== numPrompts) {
    throw new TurbomindError(
      'ERR_TM_INVALID_OPTION',
      `generation options: a list of ${options.length} for ${isBatch ? numPrompts : 'a single'} ` +
        'prompt(s); expected one object, or a list with one for each prompt of a batch',
    );
  }
  return options.map((each) => resolveGenerationOptions(each));
}

function isList(options: CallOptions): options is readonly GenerationOptions[] {
  return Array.isArray(options);
}
