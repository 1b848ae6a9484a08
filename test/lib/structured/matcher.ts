// The real matcher on this thread, for tests: a vocabulary of single bytes, so that every text can
// be tried token by token.
import { createRequire } from 'node:module';
import { GrammarHost } from '../../../lib/structured/grammar-host.js';
import type { FromWorker, ToWorker, Vocabulary } from '../../../lib/structured/protocol.js';
import { makeLoader } from '../../../lib/structured/xgrammar.js';

export const STOP = 256;
/** A special token, which no grammar may draw. */
export const SPECIAL = 257;
export const VOCAB_SIZE = 300;
export const NUM_WORDS = Math.ceil(VOCAB_SIZE / 32);

export function byteVocabulary(): Vocabulary {
  const bytes = Uint8Array.from({ length: 256 }, (_, byte) => byte);
  const offsets = Uint32Array.from({ length: VOCAB_SIZE + 1 }, (_, id) => Math.min(id, 256));
  return { bytes, offsets };
}

/** The module as its package holds it, so that these tests need no build. */
export const MATCHER_PATH: string = createRequire(import.meta.url).resolve('@mlc-ai/web-xgrammar');

/** A host and what it posted. */
export class TestHost {
  readonly posted: FromWorker[] = [];
  readonly #host: GrammarHost;
  readonly #masks = new Map<number, Uint32Array>();
  #lastSession = 0;

  constructor() {
    this.#host = new GrammarHost(makeLoader(MATCHER_PATH), byteVocabulary(), (message) => {
      this.posted.push(message);
    });
  }

  async send(message: ToWorker): Promise<FromWorker[]> {
    this.posted.length = 0;
    await this.#host.handle(message);
    return [...this.posted];
  }

  async open(ebnf: string, isForeign = false, accepted: readonly number[] = []): Promise<number> {
    this.#lastSession += 1;
    const session = this.#lastSession;
    const mask = new SharedArrayBuffer(NUM_WORDS * 4);
    this.#masks.set(session, new Uint32Array(mask));
    await this.send({ type: 'open', session, ebnf, isForeign, stopIds: [STOP], mask, accepted });
    return session;
  }

  allowed(session: number, token: number): boolean {
    const word = this.#masks.get(session)?.[token >> 5] ?? 0;
    return ((word >>> (token & 31)) & 1) === 1;
  }

  /** Whether the grammar allows the bytes as a whole answer, by its masks alone. */
  async accepts(ebnf: string, bytes: Uint8Array): Promise<boolean> {
    const session = await this.open(ebnf);
    let isOpen = true;
    for (const token of bytes) {
      isOpen = this.allowed(session, token);
      if (!isOpen) break;
      await this.send({ type: 'advance', steps: [{ session, tokens: [token] }] });
    }
    const isWhole = isOpen && this.allowed(session, STOP);
    await this.send({ type: 'close', session });
    return isWhole;
  }
}
