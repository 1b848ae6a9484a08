// The grammar service over scripted workers: which answers go on when a worker is lost, and that none is
// ever left without an answer. What the workers compute is grammar-host.test.ts's.
import { beforeAll, describe, expect, test } from 'vitest';
import { openCheckpoint } from '../../../lib/checkpoint/checkpoint.js';
import { embeddedModel } from '../../../lib/embedded-model.js';
import type { TurbomindError } from '../../../lib/errors.js';
import { GrammarService } from '../../../lib/structured/grammar-service.js';
import type { GrammarSession } from '../../../lib/structured/grammar-session.js';
import type { ToWorker } from '../../../lib/structured/protocol.js';
import type { WorkerHandlers } from '../../../lib/structured/worker-port.js';
import { loadTokenizer, type Tokenizer } from '../../../lib/tokenizer.js';

const SOURCE = { ebnf: 'root ::= "a"', isForeign: false };
let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await loadTokenizer(await openCheckpoint(embeddedModel()));
});

/** Workers that find every mask at once, as long as they answer, and that can be lost. */
class Workers {
  readonly service: GrammarService;
  answers = true;
  startError: Error | undefined;
  numStarted = 0;
  #newest: WorkerHandlers | undefined;

  constructor() {
    this.service = new GrammarService({
      tokenizer,
      vocabSize: 384,
      startWorker: (_, handlers) => {
        if (this.startError !== undefined) throw this.startError;
        this.numStarted += 1;
        this.#newest = handlers;
        return {
          post: (message) => this.#post(message, handlers),
          hold: () => undefined,
          terminate: async () => undefined,
        };
      },
    });
  }

  lose(): void {
    this.#newest?.lost('it was ended');
  }

  #post(message: ToWorker, handlers: WorkerHandlers): void {
    if (!this.answers || message.type === 'close') return;
    const sessions =
      message.type === 'open' ? [message.session] : message.steps.map(({ session }) => session);
    const results = sessions.map((session) => ({ session, status: 'ready' as const }));
    queueMicrotask(() => handlers.message({ type: 'masks', results }));
  }
}

const advance = (session: GrammarSession): Promise<Uint32Array> =>
  new Promise((resolve, reject) => session.advance([1], resolve, reject));

describe('when its worker is lost', () => {
  test('an answer that gets masks in between goes on, however often', async () => {
    const workers = new Workers();
    const session = await workers.service.open(SOURCE, [2]);
    for (let i = 0; i < 6; i += 1) {
      workers.lose();
      expect(await advance(session)).toBe(session.mask);
    }
    expect(workers.numStarted).toBe(7);
    await workers.service.close();
  });

  test('again and again before it gets a mask, it fails, also if nobody waited', async () => {
    const workers = new Workers();
    const idle = await workers.service.open(SOURCE, [2]);
    const waiting = await workers.service.open(SOURCE, [2]);
    workers.answers = false;
    const mask = advance(waiting);
    mask.catch(() => undefined);
    for (let i = 0; i < 3; i += 1) workers.lose();
    const failure: Partial<TurbomindError> = { code: 'ERR_TM_INTERNAL' };
    await expect(mask).rejects.toMatchObject(failure);
    await expect(advance(idle)).rejects.toMatchObject(failure);
    expect(workers.service.numSessions).toBe(0);
    await workers.service.close();
  });

  test('and none can be started, its answers fail and the next one tries again', async () => {
    const workers = new Workers();
    const idle = await workers.service.open(SOURCE, [2]);
    const waiting = await workers.service.open(SOURCE, [2]);
    workers.answers = false;
    const mask = advance(waiting);
    mask.catch(() => undefined);
    workers.startError = new Error('no more threads');
    workers.lose();
    workers.lose(); // as when a worker that was ended says so
    await expect(mask).rejects.toThrow('no more threads');
    await expect(advance(idle)).rejects.toThrow('no more threads');
    await expect(workers.service.open(SOURCE, [2])).rejects.toThrow('no more threads');
    workers.startError = undefined;
    workers.answers = true;
    const next = await workers.service.open(SOURCE, [2]);
    expect(await advance(next)).toBe(next.mask);
    await workers.service.close();
  });
});
