// One engine through the bare N-API border: events, argument errors, closing in the middle,
// collection, teardown. What the engine computes is judged elsewhere.
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { afterEach, describe, expect, it } from 'vitest';
import type {
  ModelSpec,
  NativeEngine,
  NativeEvent,
  NativeRequest,
  TensorEntry,
} from '../../lib/native-types.js';
import { GREEDY as SAMPLING } from '../../lib/prompt-job.js';
import { ADDON_PATH, addon, failureOf } from './support/addon.js';
import { openOptions } from './support/open-options.js';

const MODEL = fileURLToPath(new URL('../fixtures/models/qwen2-f32/', import.meta.url));

/** What lib/checkpoint hands over for this model, file names relative to its folder. */
const native: {
  readonly spec: ModelSpec;
  readonly files: readonly string[];
  readonly tensors: readonly TensorEntry[];
} = JSON.parse(readFileSync(`${MODEL}native.json`, 'utf8'));

const OPTIONS = openOptions({ ...native, files: native.files.map((file) => MODEL + file) });

function request(id: number, changes: Partial<NativeRequest> = {}): NativeRequest {
  return {
    id,
    promptTokens: Int32Array.of(1, 2, 3),
    images: [],
    sampling: SAMPLING,
    maxNewTokens: 8,
    minNewTokens: 0,
    stopTokenIds: [],
    ...changes,
  };
}

/** Gathers events and lets a test wait for the last one of a request. */
class Listener {
  readonly events: NativeEvent[] = [];
  readonly #waiters = new Map<number, (event: NativeEvent) => void>();

  readonly onEvents = (events: readonly NativeEvent[]): void => {
    for (const event of events) {
      this.events.push(event);
      if (event.finishReason !== undefined) this.#waiters.get(event.id)?.(event);
    }
  };

  end(id: number): Promise<NativeEvent> {
    const seen = this.events.find((event) => event.id === id && event.finishReason !== undefined);
    if (seen) return Promise.resolve(seen);
    return new Promise((resolve) => this.#waiters.set(id, resolve));
  }

  tokens(id: number): number {
    return this.events
      .filter((event) => event.id === id)
      .reduce((sum, event) => sum + event.tokens.length, 0);
  }
}

const opened: NativeEngine[] = [];

async function open(listener: Listener, onProgress: (share: number) => void = () => undefined) {
  const engine = await addon.open(OPTIONS, listener.onEvents, onProgress);
  opened.push(engine);
  return engine;
}

afterEach(async () => {
  await Promise.all(opened.splice(0).map((engine) => engine.close()));
});

/** As long as the model allows. */
const LONG = { maxNewTokens: native.spec.decoder.maxPositionEmbeddings - 8 };

describe('events', () => {
  it('arrive in order and end with a reason', async () => {
    const listener = new Listener();
    const shares: number[] = [];
    const engine = await open(listener, (share) => shares.push(share));
    expect(shares.at(-1)).toBe(1);
    expect(shares).toEqual([...shares].sort((a, b) => a - b));
    for (const id of [7, 8, 9]) engine.submit(request(id));
    const ends = await Promise.all([7, 8, 9].map((id) => listener.end(id)));
    expect(ends.map((event) => event.finishReason)).toEqual(['length', 'length', 'length']);
    expect([7, 8, 9].map((id) => listener.tokens(id))).toEqual([8, 8, 8]);
    expect(ends[0]?.timings?.firstTokenMs).toBeGreaterThan(0);
    expect(engine.stats()).toMatchObject({ running: 0, waiting: 0, completionTokens: 24 });
  });

  it('carry log probabilities when asked', async () => {
    const listener = new Listener();
    const engine = await open(listener);
    engine.submit(request(1, { sampling: { ...SAMPLING, numLogprobs: 2 } }));
    await listener.end(1);
    const token = listener.events[0]?.tokens[0];
    expect(token?.topLogprobs).toHaveLength(2);
    expect(token?.topLogprobs?.[0]).toEqual([token?.token, token?.logprob]);
  });

  it('answer a bad request with an error, and the others go on', async () => {
    const listener = new Listener();
    const engine = await open(listener);
    engine.submit(request(1));
    engine.submit(request(2, { promptTokens: new Int32Array(0) }));
    const bad = await listener.end(2);
    expect(bad.finishReason).toBe('error');
    expect(bad.errorCode).toMatch(/^ERR_TM_/);
    expect(bad.errorMessage).not.toBe('');
    expect((await listener.end(1)).finishReason).toBe('length');
  });

  it('end with abort for an aborted request', async () => {
    const listener = new Listener();
    const engine = await open(listener);
    engine.submit(request(1, LONG));
    engine.abort(1);
    engine.abort(99);
    expect((await listener.end(1)).finishReason).toBe('abort');
  });
});

describe('arguments', () => {
  const cases: readonly [string, object][] = [
    ['id', { id: -1 }],
    ['id', { id: 1.5 }],
    ['promptTokens', { promptTokens: [1, 2] }],
    ['promptTokens', { promptTokens: new Float32Array(2) }],
    ['images', { images: {} }],
    ['images[0].tiles', { images: [{ tiles: {}, tokenOffset: 0, numTokens: 1 }] }],
    ['sampling', { sampling: undefined }],
    ['sampling.seed', { sampling: { ...SAMPLING, seed: -1n } }],
    ['sampling.seed', { sampling: { ...SAMPLING, seed: 1 } }],
    ['sampling.topP', { sampling: { ...SAMPLING, topP: Number.NaN } }],
    ['sampling.badWords[1][0]', { sampling: { ...SAMPLING, badWords: [[1], ['x']] } }],
    ['maxNewTokens', { maxNewTokens: '8' }],
    ['stopTokenIds[0]', { stopTokenIds: [2 ** 40] }],
  ];
  it('of a wrong type throw and name the field', async () => {
    const engine = await open(new Listener());
    for (const [field, changes] of cases) {
      const wrong = { ...request(1), ...changes } as NativeRequest;
      const { code, message } = await failureOf(() => engine.submit(wrong));
      expect(code, field).toBe('ERR_TM_INVALID_ARGUMENT');
      expect(message).toContain(`submit: request.${field}: expected`);
    }
    expect(engine.stats()).toMatchObject({ running: 0, waiting: 0 });
  });

  it('an id in flight is refused', async () => {
    const listener = new Listener();
    const engine = await open(listener);
    engine.submit(request(1, LONG));
    const { code, message } = await failureOf(() => engine.submit(request(1)));
    expect([code, message]).toEqual([
      'ERR_TM_INVALID_ARGUMENT',
      'submit: request.id: 1 is in flight already; ids must be unique',
    ]);
    engine.abort(1);
    await listener.end(1);
    engine.submit(request(1));
  });
});

describe('closing', () => {
  it('delivers all events before it resolves, may be repeated, and refuses what follows', async () => {
    const listener = new Listener();
    const engine = await open(listener);
    for (let id = 0; id < 12; id++) engine.submit(request(id, LONG));
    const closes = [engine.close(), engine.close()];
    const disposed = await failureOf(() => engine.submit(request(50)));
    expect(disposed.code).toBe('ERR_TM_DISPOSED');
    await closes[0];
    const ended = listener.events.filter((event) => event.finishReason !== undefined);
    expect(new Set(ended.map((event) => event.id)).size).toBe(12);
    await closes[1];
    await engine.close();
    expect((await failureOf(() => engine.stats())).code).toBe('ERR_TM_DISPOSED');
    expect((await failureOf(() => engine.promptLogits(request(1)))).code).toBe('ERR_TM_DISPOSED');
    engine.abort(3);
  });

  it('waits for prompt logits under way, which settle', async () => {
    const engine = await open(new Listener());
    const logits = Array.from({ length: 8 }, (_, i) =>
      engine.promptLogits(request(i)).then(
        (values) => values.length,
        (error: { code?: unknown }) => error.code,
      ),
    );
    await engine.close();
    for (const outcome of await Promise.all(logits)) {
      expect([native.spec.decoder.vocabSize, 'ERR_TM_DISPOSED']).toContain(outcome);
    }
  });

  it('from within an event callback is fine', async () => {
    let closed: Promise<void> | undefined;
    let engine: NativeEngine | undefined;
    engine = await addon.open(
      OPTIONS,
      () => {
        closed ??= engine?.close();
      },
      () => undefined,
    );
    engine.submit(request(1, LONG));
    while (!closed) await new Promise((resolve) => setImmediate(resolve));
    await closed;
  });
});

const PRELUDE = `
  const { workerData } = require('node:worker_threads');
  const { path, options, request } = workerData ?? JSON.parse(process.env.BORDER);
  const addon = require(path);
  const make = (id, maxNewTokens) => ({ ...request, id, maxNewTokens,
    sampling: { ...request.sampling, seed: 0n }, promptTokens: Int32Array.of(1, 2, 3) });
  const open = (onEvents = () => {}) => addon.open(options, onEvents, () => {});`;
const DATA = {
  path: ADDON_PATH,
  options: OPTIONS,
  request: { ...request(0), promptTokens: undefined, sampling: { ...SAMPLING, seed: undefined } },
};

function runChild(code: string, ...flags: string[]) {
  const result = spawnSync(process.execPath, [...flags, '-e', PRELUDE + code], {
    encoding: 'utf8',
    timeout: 60_000,
    env: { ...process.env, BORDER: JSON.stringify(DATA) },
  });
  return [result.status, result.signal, result.stdout, result.stderr];
}

describe('teardown', () => {
  it('an open engine lets the process end; a running request does not', () => {
    const code = `open((events) => {
      for (const event of events) if (event.finishReason) console.log(event.finishReason);
    }).then((engine) => engine.submit(make(1, 20)));`;
    expect(runChild(code)).toEqual([0, null, 'length\n', '']);
  });

  it('process.exit during generation and during a load is clean', () => {
    const code = `open().then((engine) => {
      for (let i = 0; i < 8; i++) engine.submit(make(i, ${LONG.maxNewTokens}));
      open();
      setImmediate(() => process.exit(5));
    });`;
    expect(runChild(code)).toEqual([5, null, '', '']);
  });

  it('an exception in the event callback is uncaught, once for each call', () => {
    const code = `let calls = 0;
      process.on('uncaughtException', (error) => console.log(error.message));
      open(() => { if (calls++ === 0) throw new Error('mine'); })
        .then((engine) => engine.submit(make(1, 4)));`;
    expect(runChild(code)).toEqual([0, null, 'mine\n', '']);
  });

  it('a collected engine is closed and its thread ends', () => {
    const code = `(async () => {
      const fs = require('node:fs');
      const threads = () => fs.readdirSync('/proc/self/task').length;
      const turn = () => new Promise((resolve) => setImmediate(resolve));
      await (async () => { await (await open()).close(); })();
      const before = threads();
      await (async () => { for (let i = 0; i < 5; i++) await open(); })();
      for (let i = 0; i < 2000 && threads() > before; i++) { gc(); await turn(); }
      console.log(threads() <= before);
    })();`;
    expect(runChild(code, '--expose-gc')).toEqual([0, null, 'true\n', '']);
  });

  it('workers may be terminated while they generate', async () => {
    const code = `open().then((engine) => {
      let id = 0;
      const more = () => { for (let i = 0; i < 4; i++) engine.submit(make(id++, 50)); };
      setInterval(more, 1);
      more();
      require('node:worker_threads').parentPort.postMessage('busy');
    });`;
    for (let round = 0; round < 6; round++) {
      const workers = [0, 1].map(
        () => new Worker(PRELUDE + code, { eval: true, workerData: DATA }),
      );
      await Promise.all(
        workers.map(
          (worker) =>
            new Promise((resolve, reject) => {
              worker.once('message', resolve);
              worker.once('error', reject);
            }),
        ),
      );
      const codes = await Promise.all(workers.map((worker) => worker.terminate()));
      expect(codes).toEqual([1, 1]);
    }
  });
});
