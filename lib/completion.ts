// One request in flight, seen from JavaScript: native events become tokens, text and at last a
// Response. Knows nothing of engines or readers. Runs on the JS thread; the work per token is one
// detokenizer push and one array push, because a batch of events may hold hundreds of tokens.
import { TextStream } from './detokenizer.js';
import { TurbomindError, type TurbomindErrorCode } from './errors.js';
import { nativeErrorCode } from './native.js';
import type { NativeEvent, NativeTimings, NativeTokenEvent } from './native-types.js';
import type { ResolvedGenerationOptions } from './options.js';
import type { FinishReason, Response, StreamPart, TokenLogprobs } from './response.js';
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
  'skipSpecialTokens' | 'stopWords' | 'numLogprobs' | 'numTopLogprobs'
>;

export class Completion {
  readonly index: number;
  response: Response | undefined;
  readonly #listener: CompletionListener;
  readonly #startedAt: number;
  readonly #textStream: TextStream;
  readonly #tokenIds: number[] = [];
  readonly #logprobs: TokenLogprobs[] | undefined;
  readonly #numTopLogprobs: number;
  #inputTokenLen = 0;
  #text = '';
  #untakenText = '';
  #takenTokens = 0;
  #submittedAt = 0;
  #firstTokenAt = 0;
  #stopWord: string | undefined;

  /** @param startedAt when the caller called, by performance.now(). */
  constructor(
    index: number,
    startedAt: number,
    tokenizer: Tokenizer,
    options: CompletionOptions,
    listener: CompletionListener,
  ) {
    this.index = index;
    this.#startedAt = startedAt;
    this.#listener = listener;
    this.#logprobs = options.numLogprobs > 0 ? [] : undefined;
    this.#numTopLogprobs = options.numTopLogprobs;
    this.#textStream = new TextStream(tokenizer, {
      skipSpecialTokens: options.skipSpecialTokens,
      stopStrings: options.stopWords,
    });
  }

  /** A stop word was found: what the engine still sends is not part of the answer. */
  get hasStopped(): boolean {
    return this.#stopWord !== undefined;
  }

  submitted(inputTokenLen: number): void {
    this.#inputTokenLen = inputTokenLen;
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

  /** Ends it with an error that concerns this request alone. */
  failWith(error: TurbomindError): void {
    this.#settle('error', undefined, NO_TIMINGS, error);
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
      topLogprobs: event.topLogprobs?.slice(0, this.#numTopLogprobs) ?? [],
    });
    if (isStopToken) return;
    const piece = this.#textStream.push(event.token);
    this.#append(piece.text);
    if (piece.match !== undefined) this.#stopWord = piece.match.stop;
  }

  #append(text: string): void {
    if (text === '') return;
    this.#text += text;
    this.#untakenText += text;
  }

  #finish(event: NativeEvent, reason: FinishReason): void {
    const timings = event.timings ?? NO_TIMINGS;
    if (reason === 'error') {
      const message = event.errorMessage ?? 'the engine gave no reason';
      const error = new TurbomindError(errorCodeOf(event), message);
      this.#settle('error', undefined, timings, error);
      return;
    }
    if (this.#stopWord === undefined) this.#flush();
    if (this.#stopWord !== undefined) this.#settle('stop', this.#stopWord, timings, undefined);
    else this.#settle(reason, event.matchedStop, timings, undefined);
  }

  #flush(): void {
    const piece = this.#textStream.flush();
    this.#append(piece.text);
    if (piece.match !== undefined) this.#stopWord = piece.match.stop;
  }

  #settle(
    finishReason: FinishReason,
    matchedStop: string | number | undefined,
    timings: NativeTimings,
    error: TurbomindError | undefined,
  ): void {
    const now = performance.now();
    const since = (time: number): number => (time === 0 ? 0 : time - this.#startedAt);
    this.response = {
      text: this.#text,
      tokenIds: this.#tokenIds,
      finishReason,
      matchedStop,
      inputTokenLen: this.#inputTokenLen,
      generateTokenLen: this.#tokenIds.length,
      logprobs: this.#logprobs,
      timings: {
        preprocessMs: since(this.#submittedAt),
        queueMs: timings.queueMs,
        visionMs: timings.visionMs,
        prefillMs: timings.prefillMs,
        firstTokenMs: since(this.#firstTokenAt),
        decodeMs: timings.decodeMs,
        totalMs: now - this.#startedAt,
      },
      index: this.index,
      error,
    };
    this.#listener.finished(this);
  }
}

function errorCodeOf(event: NativeEvent): TurbomindErrorCode {
  return nativeErrorCode(event.errorCode) ?? 'ERR_TM_INTERNAL';
}
