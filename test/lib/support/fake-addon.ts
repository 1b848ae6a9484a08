// A NativeAddon without native code: requests are answered with scripted tokens, one a step, in
// one batch of events for all that run, as the real engine does. Steps run by themselves between
// turns of the event loop, or by hand.
import { createHash } from 'node:crypto';
import type {
  MemoryReport,
  NativeAddon,
  NativeEngine,
  NativeEvent,
  NativeOpenOptions,
  NativeRequest,
  NativeStats,
  NativeTileOptions,
  NativeTiles,
} from '../../../lib/native-types.js';

export interface FakeSettings {
  /** Tokens that answer a request, the stop token included. */
  readonly answer: (request: NativeRequest) => readonly number[];
  /** Steps happen when `engine.step()` is called. */
  readonly manual?: boolean;
  readonly openError?: Error;
  readonly sessionLen?: number;
}

/** The embedded model's. */
export const FAKE_VOCAB = 384;
export const FAKE_HIDDEN = 384;

interface Running {
  readonly request: NativeRequest;
  readonly tokens: readonly number[];
  numSent: number;
  /** Of edited logits. */
  drawn?: number | undefined;
  isOffered?: boolean;
}

export class FakeEngine implements NativeEngine {
  readonly submitted: NativeRequest[] = [];
  readonly aborted: number[] = [];
  readonly masks: { id: number; completionIdx: number; mask: Uint32Array | null }[] = [];
  readonly edited: { id: number; completionIdx: number; logits: Float32Array }[] = [];
  readonly running = new Map<number, Running>();
  isClosed = false;
  numCloses = 0;
  readonly #settings: FakeSettings;
  readonly #emit: (events: readonly NativeEvent[]) => void;
  readonly #sessionLen: number;
  #ticking = false;

  constructor(
    settings: FakeSettings,
    options: NativeOpenOptions,
    emit: (events: readonly NativeEvent[]) => void,
  ) {
    this.#settings = settings;
    this.#emit = emit;
    this.#sessionLen =
      settings.sessionLen ?? (options.sessionLen || options.spec.decoder.maxPositionEmbeddings);
  }

  submit(request: NativeRequest): void {
    if (this.isClosed) throw Object.assign(new Error('closed'), { code: 'ERR_TM_DISPOSED' });
    this.submitted.push(request);
    const tokens = this.#settings.answer(request);
    this.running.set(request.id, { request, tokens, numSent: 0 });
    if (this.#settings.manual !== true) this.#tick();
  }

  abort(id: number): void {
    this.aborted.push(id);
    if (this.running.delete(id)) this.#emit([{ id, tokens: [], finishReason: 'abort' }]);
  }

  setMask(id: number, completionIdx: number, mask: Uint32Array | null): void {
    this.masks.push({ id, completionIdx, mask: mask?.slice() ?? null });
  }

  setLogits(id: number, completionIdx: number, logits: Float32Array): void {
    this.edited.push({ id, completionIdx, logits });
    const running = this.running.get(id);
    if (running === undefined || running.request.editsLogits !== true) return;
    running.drawn = logits.indexOf(Math.max(...logits));
    if (this.#settings.manual !== true) this.#tick();
  }

  /** One token for every running request. */
  step(): void {
    const events: NativeEvent[] = [];
    for (const running of this.running.values()) {
      const event = this.#advance(running);
      if (event !== undefined) events.push(event);
    }
    if (events.length > 0) this.#emit(events);
  }

  #hasMask({ request, numSent }: Running): boolean {
    return this.masks.some(
      ({ id, completionIdx }) => id === request.id && completionIdx === numSent,
    );
  }

  fail(id: number, errorCode: string, errorMessage: string): void {
    this.running.delete(id);
    this.#emit([{ id, tokens: [], finishReason: 'error', errorCode, errorMessage }]);
  }

  stats(): NativeStats {
    return {
      running: this.running.size,
      waiting: 0,
      totalBlocks: 8,
      freeBlocks: 8,
      steps: 0,
      preemptions: 0,
      swapsOut: 0,
      swapsIn: 0,
      swapBlocks: 0,
      freeSwapBlocks: 0,
      stepTimes: { bounds: [0.01, 0.1], counts: [2, 1, 0], sum: 0.06 },
      promptTokens: 0,
      completionTokens: 0,
      draftedTokens: 0,
      acceptedTokens: 0,
      cachedBlocks: 0,
      prefixQueries: 0,
      prefixHits: 0,
      weightBytes: 0,
      kvCacheBytes: 0,
      workspaceBytes: 0,
      loadMs: 0,
      sessionLen: this.#sessionLen,
      deviceName: 'fake',
      deviceDescription: 'no device',
    };
  }

  memory(): MemoryReport {
    return fakeMemory();
  }

  async close(): Promise<void> {
    this.numCloses += 1;
    this.isClosed = true;
    this.running.clear();
  }

  async promptLogits(request: NativeRequest): Promise<Float32Array> {
    return Float32Array.from([request.promptTokens.length]);
  }

  // Logits are 1 for the scripted token; hidden states, pooled or not, are the prompt's length.
  #advance(running: Running): NativeEvent | undefined {
    const { request, tokens } = running;
    let token = tokens[running.numSent] ?? 0;
    if (request.maxNewTokens === 0) {
      this.running.delete(request.id);
      return { id: request.id, tokens: [], finishReason: 'length', ...this.#outputs(request, 0) };
    }
    if (request.guided === true && !this.#hasMask(running)) return undefined;
    if (request.editsLogits === true) {
      if (running.drawn === undefined) {
        if (running.isOffered === true) return undefined;
        running.isOffered = true;
        const logits = this.#scripted([token]);
        return { id: request.id, tokens: [], completionIdx: running.numSent, logits };
      }
      token = running.drawn;
      running.drawn = undefined;
      running.isOffered = false;
    }
    running.numSent += 1;
    const logprobs =
      request.sampling.numLogprobs > 0
        ? { logprob: -0.5, topLogprobs: [[token, -0.5] as const] }
        : {};
    const event = { id: request.id, tokens: [{ token, ...logprobs }] };
    const timings = { queueMs: 1, visionMs: 2, prefillMs: 3, firstTokenMs: 4, decodeMs: 5 };
    if (request.stopTokenIds.includes(token)) {
      this.running.delete(request.id);
      const outputs = this.#outputs(request, running.numSent);
      return { ...event, finishReason: 'stop', matchedStop: token, timings, ...outputs };
    }
    if (running.numSent === request.maxNewTokens || running.numSent === tokens.length) {
      this.running.delete(request.id);
      const outputs = this.#outputs(request, running.numSent);
      return { ...event, finishReason: 'length', timings, ...outputs };
    }
    return event;
  }

  #scripted(tokens: readonly number[]): Float32Array {
    const logits = new Float32Array(tokens.length * FAKE_VOCAB);
    for (const [row, token] of tokens.entries()) logits[row * FAKE_VOCAB + token] = 1;
    return logits;
  }

  #outputs(request: NativeRequest, numTokens: number): Pick<NativeEvent, 'outputs'> {
    const spec = request.outputs;
    if (spec === undefined) return {};
    const { promptTokens } = request;
    const rows = (range: string): number[] => {
      const answer = this.#settings.answer(request).slice(0, numTokens);
      return range === 'all' ? [...promptTokens.slice(1), ...answer] : [...answer];
    };
    const outputs = {
      ...(spec.logits === 'none' ? {} : { logits: this.#scripted(rows(spec.logits)) }),
      ...(spec.hiddenStates === 'none'
        ? {}
        : {
            hiddenStates: new Float32Array(rows(spec.hiddenStates).length * FAKE_HIDDEN).fill(
              promptTokens.length,
            ),
          }),
      pooled: spec.pooling === 'none' ? [] : [promptTokens.length, 0, -promptTokens.length],
      nll: spec.promptNll ? 0.5 * (promptTokens.length - 1) : 0,
      numNllTokens: spec.promptNll ? promptTokens.length - 1 : 0,
    };
    return { outputs };
  }

  #tick(): void {
    if (this.#ticking) return;
    this.#ticking = true;
    setImmediate(() => {
      this.#ticking = false;
      this.step();
      if (this.running.size > 0) this.#tick();
    });
  }
}

export interface FakeAddon extends NativeAddon {
  readonly engines: FakeEngine[];
  readonly opened: NativeOpenOptions[];
  readonly tiled: (NativeTileOptions & { readonly width: number; readonly height: number })[];
}

export function makeFakeAddon(settings: FakeSettings): FakeAddon {
  const engines: FakeEngine[] = [];
  const opened: NativeOpenOptions[] = [];
  const tiled: FakeAddon['tiled'] = [];
  return {
    engines,
    opened,
    tiled,
    version: '0.1.0',
    cpuInfo: () => ({
      isa: 'scalar',
      features: [],
      threads: 1,
      totalMemoryBytes: 1,
      freeMemoryBytes: 1,
    }),
    queryCuda: () => ({ deviceCount: 0, devices: [], problems: [], error: 'fake' }),
    open: async (options, onEvents, onProgress) => {
      opened.push(options);
      onProgress(1);
      if (settings.openError) throw settings.openError;
      const engine = new FakeEngine(settings, options, onEvents);
      engines.push(engine);
      return engine;
    },
    estimate: (options) => {
      opened.push(options);
      return fakeMemory();
    },
    makeTiles: async (_pixels, width, height, _channels, options) => {
      tiled.push({ ...options, width, height });
      return makeFakeTiles(options.maxTiles, options.tileSize);
    },
    hashBytes: (bytes, previous) =>
      createHash('md5').update(previous).update('/').update(bytes).digest('hex'),
    chooseGrid: () => ({ columns: 1, rows: 1 }),
    resizeBicubic: (pixels) => pixels,
  };
}

function fakeMemory(): MemoryReport {
  return {
    device: 'fake',
    freeBytes: 100,
    weightBytes: 1,
    visionWeightBytes: 0,
    activationBytes: 1,
    visionActivationBytes: 0,
    imageEmbeddingBytes: 0,
    scratchBytes: 1,
    samplingBytes: 1,
    graphBytes: 0,
    reserveBytes: 0,
    kvCacheBytes: 8,
    totalBytes: 12,
    hostStagingBytes: 0,
    kvBlockBytes: 1,
    kvBlocks: 8,
    kvBlockTokens: 64,
    kvBits: 16,
    allocatedBytes: 12,
    deviceFreeBytes: 88,
    hostSwapBytes: 0,
    swapBlocks: 0,
    use: {
      decoderBytes: 2,
      visionBytes: 0,
      workspaceBytes: 2,
      kvCacheBytes: 8,
      imageEmbeddingBytes: 0,
      hostSwapBytes: 0,
    },
  };
}

function makeFakeTiles(numTiles: number, tileSize: number): NativeTiles {
  return {
    columns: numTiles,
    rows: 1,
    numTiles,
    tileSize,
    pixels: () => new Uint8Array(),
    contentHash: '0'.repeat(32),
  };
}
