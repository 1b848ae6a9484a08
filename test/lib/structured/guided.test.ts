// Guided requests through the whole library: real grammars, a fake engine.
import { beforeAll, describe, expect, test } from 'vitest';
import { PromptBuilder } from '../../../lib/chat.js';
import { openCheckpoint } from '../../../lib/checkpoint/checkpoint.js';
import { embeddedModel } from '../../../lib/embedded-model.js';
import { resolvePipelineOptions } from '../../../lib/options.js';
import { Pipeline } from '../../../lib/pipeline.js';
import { EventRouter } from '../../../lib/router.js';
import { GrammarHost } from '../../../lib/structured/grammar-host.js';
import type { FromWorker } from '../../../lib/structured/protocol.js';
import type { StartWorker, WorkerHandlers } from '../../../lib/structured/worker-port.js';
import { makeLoader } from '../../../lib/structured/xgrammar.js';
import { loadTokenizer, type Tokenizer } from '../../../lib/tokenizer.js';
import { makeFakeAddon } from '../support/fake-addon.js';
import { MATCHER_PATH } from './matcher.js';

const EOS = 258;
let tokenizer: Tokenizer;
let load: ReturnType<typeof makeLoader>;
beforeAll(async () => {
  tokenizer = await loadTokenizer(await openCheckpoint(embeddedModel()));
  load = makeLoader(MATCHER_PATH);
});

/** Workers in place; the first ones may break when told to. */
function makeWorkers(breakAt = Number.POSITIVE_INFINITY): StartWorker & { numStarted: number } {
  let numAdvances = 0;
  const start = (vocabulary: Parameters<StartWorker>[0], handlers: WorkerHandlers) => {
    start.numStarted += 1;
    let isAlive = true;
    const post = (message: FromWorker): void => {
      setImmediate(() => {
        if (isAlive) handlers.message(message);
      });
    };
    const host = new GrammarHost(load, vocabulary, post);
    return {
      post: (message: Parameters<GrammarHost['handle']>[0]) => {
        numAdvances += message.type === 'advance' ? 1 : 0;
        if (numAdvances === breakAt) {
          breakAt = 0;
          setImmediate(() => handlers.lost('it was ended'));
        } else void host.handle(message);
      },
      hold: () => undefined,
      terminate: async () => {
        isAlive = false;
      },
    };
  };
  start.numStarted = 0;
  return start;
}

async function open(text: string, startWorker: StartWorker = makeWorkers()) {
  const addon = makeFakeAddon({ answer: () => [...tokenizer.encode(text), EOS] });
  const checkpoint = await openCheckpoint(embeddedModel());
  const router = new EventRouter();
  const options = resolvePipelineOptions({ device: 'cpu' });
  const native = { spec: checkpoint.spec, sessionLen: 0 };
  // The fake engine reads no more than these of its options.
  const engine = await addon.open(
    { ...native, files: [], tensors: [] } as never,
    router.onEvents,
    () => undefined,
  );
  router.attach(engine);
  const promptBuilder = new PromptBuilder(checkpoint, tokenizer);
  const parts = { addon, engine, router, checkpoint, tokenizer, promptBuilder, options };
  const pipe = new Pipeline({ ...parts, startWorker });
  const [fake] = addon.engines;
  if (fake === undefined) throw new Error('no engine');
  return { pipe, engine: fake };
}

const isAllowed = (mask: Uint32Array | null | undefined, token: number): boolean =>
  mask === null || (((mask?.[token >> 5] ?? 0) >>> (token & 31)) & 1) === 1;

describe('a guided request', () => {
  const responseFormat = { type: 'choice', choices: ['yes', 'yesterday'] } as const;

  test('gets the mask of every token, and ends with the grammar', async () => {
    const { pipe, engine } = await open('yes');
    const response = await pipe('Hello!', { responseFormat });
    expect(response).toMatchObject({ text: 'yes', finishReason: 'stop' });
    expect(engine.submitted[0]?.guided).toBe(true);
    const ids = [...tokenizer.encode('yes'), EOS];
    expect(engine.masks.map(({ completionIdx }) => completionIdx)).toEqual([0, 1, 2, 3]);
    for (const [index, { mask }] of engine.masks.entries()) {
      expect(isAllowed(mask, ids[index] ?? -1)).toBe(true);
      expect(isAllowed(mask, EOS)).toBe(index === 3);
    }
    await pipe.close();
  });

  test('a token outside its grammar ends it alone', async () => {
    const { pipe } = await open('no');
    const [guided, free] = await pipe(['Hello!', 'Hello!'], [{ responseFormat }, {}]);
    expect(guided?.error).toMatchObject({ code: 'ERR_TM_INTERNAL' });
    expect(guided?.error?.message).toMatch(/does not allow the token/);
    expect(free?.text).toBe('no');
    await pipe.close();
  });

  test('goes on when its worker is lost', async () => {
    const workers = makeWorkers(2);
    const { pipe } = await open('yesterday', workers);
    expect((await pipe('Hello!', { responseFormat })).text).toBe('yesterday');
    expect(workers.numStarted).toBe(2);
    await pipe.close();
  });

  test('several answers have a mask each', async () => {
    const { pipe, engine } = await open('yes');
    await pipe('Hello!', { responseFormat, n: 3, doSample: true });
    expect(new Set(engine.masks.map(({ id }) => id)).size).toBe(3);
    await pipe.close();
  });

  test('is refused before anything is submitted', async () => {
    const { pipe, engine } = await open('yes');
    const bad = [
      { responseFormat: { type: 'grammar', ebnf: 'root ::= nothing' } },
      { responseFormat: { type: 'json_schema', jsonSchema: { schema: { type: 'foo' } } } },
      { responseFormat, minNewTokens: 3 },
      { responseFormat, ignoreEos: true },
      { responseFormat, ignoreEos: true, stopTokenIds: [65] },
    ] as const;
    for (const options of bad) {
      await expect(pipe('Hello!', options)).rejects.toMatchObject({
        code: 'ERR_TM_INVALID_OPTION',
      });
    }
    expect(engine.submitted).toEqual([]);
    await pipe.close();
  });

  test('closing ends what waits for a grammar', async () => {
    const { pipe } = await open('yes');
    const answer = pipe('Hello!', { responseFormat: { type: 'json_object' } });
    answer.catch(() => undefined);
    await new Promise((resolve) => setImmediate(resolve));
    await pipe.close();
    await expect(answer).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
  });
});
