// One request in flight, seen from JavaScript: native events become tokens, text and at last a
// Response. Knows nothing of engines or readers. Runs on the JS thread; the work per token is one
// detokenizer push and one array push, because a batch of events may hold hundreds of tokens.
import { TextStream } from './detokenizer.js';
import { TurbomindError, type TurbomindErrorCode } from './errors.js';
import { nativeErrorCode } from './native.js';
import type { NativeEvent, NativeTimings, NativeTokenEvent } from './native-types.js';
import type { LogitsProcessor, OutputRange, ResolvedGenerationOptions } from './options.js';
import type { FinishReason, FloatRows, Response, StreamPart, TokenLogprobs } from './response.js';
import type { RequestHandler } from './router.js';
import type { Tokenizer } from './tokenizer.js';

/** Told when there is something to take, and once at the end. */
export interface CompletionListener {
  updated(completion: Completion): void;
  /** `completion.response` is set. */
  finished(completion: Completion): void;
  /** The request ended without a response: aborted or disposed. */
  failed(reason: unknown): void;
}

const NO_TIMINGS: NativeTimings = {
  queueMs: 0,
  visionMs: 0,
  prefillMs: 0,
  firstTokenMs: 0,
  decodeMs: 0,
};

/** What a completion needs to know of its request's options. */
export type CompletionOptions = Pick<
  ResolvedGenerationOptions,
  | 'skipSpecialTokens'
  | 'stopWords'
  | 'numLogprobs'
  | 'numTopLogprobs'
  | 'outputLogits'
  | 'outputLastHiddenState'
  | 'logitsProcessors'
  | 'grammar'
>;

/** Which of the answers of a call it is. */
export interface CompletionPlace {
  /** Of the prompt in its batch. */
  readonly index: number;
  /** Of the answer among those of its prompt. */
  readonly choice: number;
}

/** Columns of logits and hidden states. */
export interface OutputSizes {
  readonly vocabSize: number;
  readonly hiddenSize: number;
}

export class Completion implements RequestHandler {
  readonly index: number;
  readonly choice: number;
  response: Response | undefined;
  readonly #listener: CompletionListener;
  readonly startedAt: number;
  readonly #textStream: TextStream;
  readonly #tokenIds: number[] = [];
  readonly #logprobs: TokenLogprobs[] | undefined;
  readonly #options: CompletionOptions;
  readonly #sizes: OutputSizes;
  #promptTokens: Int32Array = new Int32Array();
  #text = '';
  #untakenText = '';
  #takenTokens = 0;
  #submittedAt = 0;
  #firstTokenAt = 0;
  #stopWord: string | undefined;

  /** @param startedAt when the caller called, by performance.now(). */
  constructor(
    { index, choice }: CompletionPlace,
    startedAt: number,
    tokenizer: Tokenizer,
    options: CompletionOptions,
    sizes: OutputSizes,
    listener: CompletionListener,
  ) {
    this.index = index;
    this.choice = choice;
    this.#options = options;
    this.#sizes = sizes;
    this.startedAt = startedAt;
    this.#listener = listener;
    this.#logprobs = options.numLogprobs > 0 ? [] : undefined;
    this.#textStream = new TextStream(tokenizer, {
      skipSpecialTokens: options.skipSpecialTokens,
      stopStrings: options.stopWords,
      keepLeadingSpace: options.grammar !== undefined,
    });
  }

  /** A stop word was found: what the engine still sends is not part of the answer. */
  get hasStopped(): boolean {
    return this.#stopWord !== undefined;
  }

  submitted(promptTokens: Int32Array): void {
    this.#promptTokens = promptTokens;
    this.#submittedAt = performance.now();
  }

  /** Takes in an event; true when it was the last one. */
  accept(event: NativeEvent): boolean {
    const { tokens } = event;
    const endsOnToken = event.finishReason === 'stop' && event.matchedStop !== undefined;
    const lastIndex = tokens.length - 1;
    for (let i = 0; i <= lastIndex && this.#stopWord === undefined; i++) {
      const token = tokens[i];
      if (token !== undefined) this.#acceptToken(token, endsOnToken && i === lastIndex);
    }
    if (event.finishReason === undefined) {
      if (tokens.length > 0) this.#listener.updated(this);
      return false;
    }
    this.#finish(event, event.finishReason);
    return true;
  }

  /** What the request's logits processors make of `logits`, one after the other. */
  edit(logits: Float32Array): Float32Array {
    const ids = new Int32Array(this.#promptTokens.length + this.#tokenIds.length);
    ids.set(this.#promptTokens);
    ids.set(this.#tokenIds, this.#promptTokens.length);
    let current = logits;
    for (const processor of this.#options.logitsProcessors) {
      current = processed(processor, ids, current);
    }
    return current;
  }

  /** Ends it with an error that concerns this request alone. */
  failWith(error: TurbomindError): void {
    this.#settle('error', undefined, {}, error);
  }

  /** Ends it without a response. */
  reject(reason: unknown): void {
    this.#listener.failed(reason);
  }

  /** What came since the last call; undefined when there is nothing to show. */
  take(): StreamPart | undefined {
    const from = this.#takenTokens;
    if (this.#untakenText === '' && from === this.#tokenIds.length && this.response === undefined) {
      return undefined;
    }
    const part: StreamPart = {
      text: this.#untakenText,
      tokenIds: this.#tokenIds.slice(from),
      logprobs: this.#logprobs?.slice(from),
      index: this.index,
      choice: this.choice,
      finishReason: this.response?.finishReason,
      response: this.response,
    };
    this.#untakenText = '';
    this.#takenTokens = this.#tokenIds.length;
    return part;
  }

  #acceptToken(event: NativeTokenEvent, isStopToken: boolean): void {
    if (this.#tokenIds.length === 0) this.#firstTokenAt = performance.now();
    this.#tokenIds.push(event.token);
    this.#logprobs?.push({
      tokenId: event.token,
      logprob: event.logprob ?? 0,
      topLogprobs: event.topLogprobs?.slice(0, this.#options.numTopLogprobs) ?? [],
    });
    if (isStopToken) return;
    const piece = this.#textStream.push(event.token);
    this.#append(piece.text);
    if (piece.stop !== undefined) this.#stopWord = piece.stop;
  }

  #append(text: string): void {
    if (text === '') return;
    this.#text += text;
    this.#untakenText += text;
  }

  #finish(event: NativeEvent, reason: FinishReason): void {
    if (reason === 'error') {
      const message = event.errorMessage ?? 'the engine gave no reason';
      const error = new TurbomindError(errorCodeOf(event), message);
      this.#settle('error', undefined, event, error);
      return;
    }
    if (this.#stopWord === undefined) this.#flush();
    if (this.#stopWord !== undefined) this.#settle('stop', this.#stopWord, event, undefined);
    else this.#settle(reason, event.matchedStop, event, undefined);
  }

  #flush(): void {
    const piece = this.#textStream.flush();
    this.#append(piece.text);
    if (piece.stop !== undefined) this.#stopWord = piece.stop;
  }

  #settle(
    finishReason: FinishReason,
    matchedStop: string | number | undefined,
    {
      timings = NO_TIMINGS,
      outputs,
      cachedTokens = 0,
    }: Pick<NativeEvent, 'timings' | 'outputs' | 'cachedTokens'>,
    error: TurbomindError | undefined,
  ): void {
    const { outputLogits, outputLastHiddenState } = this.#options;
    const { vocabSize, hiddenSize } = this.#sizes;
    const now = performance.now();
    const since = (time: number): number => (time === 0 ? 0 : time - this.startedAt);
    this.response = {
      text: this.#text,
      tokenIds: this.#tokenIds,
      finishReason,
      matchedStop,
      inputTokenLen: this.#promptTokens.length,
      cachedTokens,
      generateTokenLen: this.#tokenIds.length,
      logprobs: this.#logprobs,
      logits: this.#rows(outputs?.logits, outputLogits, vocabSize),
      lastHiddenState: this.#rows(outputs?.hiddenStates, outputLastHiddenState, hiddenSize),
      timings: {
        preprocessMs: since(this.#submittedAt),
        queueMs: timings.queueMs,
        visionMs: timings.visionMs,
        prefillMs: timings.prefillMs,
        firstTokenMs: since(this.#firstTokenAt),
        decodeMs: timings.decodeMs,
        totalMs: now - this.startedAt,
      },
      index: this.index,
      choice: this.choice,
      choices: undefined,
      error,
    };
    this.#listener.finished(this);
  }

  // The engine may have gone on behind a stop word: its rows are not part of the answer.
  #rows(
    data: Float32Array | undefined,
    range: OutputRange,
    columns: number,
  ): FloatRows | undefined {
    if (range === 'none') return undefined;
    const numTokens = this.#tokenIds.length;
    const numPrompt = range === 'all' ? this.#promptTokens.length - 1 : 0;
    const available = (data?.length ?? 0) / columns;
    const rows = Math.min(available, numPrompt + numTokens);
    return {
      data: data?.subarray(0, rows * columns) ?? new Float32Array(),
      shape: [rows, columns],
    };
  }
}

function processed(
  processor: LogitsProcessor,
  ids: Int32Array,
  logits: Float32Array,
): Float32Array {
  let result: unknown;
  try {
    result = processor(ids, logits);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new TurbomindError('ERR_TM_LOGITS_PROCESSOR', `logitsProcessor threw: ${reason}`, {
      cause: error,
    });
  }
  if (result === undefined) return logits;
  if (result instanceof Float32Array && result.length === logits.length) return result;
  throw new TurbomindError(
    'ERR_TM_LOGITS_PROCESSOR',
    `logitsProcessor returned ${describe(result)}; expected undefined, or a Float32Array of ` +
      `${logits.length} logits, at once and not as a promise`,
  );
}

function describe(value: unknown): string {
  if (value instanceof Float32Array) return `${value.length} logits`;
  return value instanceof Promise ? 'a promise' : `a value of type ${typeof value}`;
}

function errorCodeOf(event: NativeEvent): TurbomindErrorCode {
  return nativeErrorCode(event.errorCode) ?? 'ERR_TM_INTERNAL';
}
