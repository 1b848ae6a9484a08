// Owns the matcher: compiled grammars, one matcher a session, masks. Everything here may take long
// (a mask up to some ms, a grammar up to seconds), so it runs on a worker's thread; tests run it in
// place. Compiled grammars cannot cross threads, hence the masks do.
import type { FromWorker, MaskStatus, SessionStep, ToWorker, Vocabulary } from './protocol.js';
import type { XCompiler, XHandle, XInstance, XLoader, XMatcher } from './xgrammar.js';

/** Grammars kept though no session uses them; each holds some MB for a large vocabulary. */
const MOST_GRAMMARS = 32;
/** Matchers kept for a grammar's next sessions. */
const MOST_SPARE = 64;
/** Masks are sent on at least this often, so that the first of many does not wait for the last. */
const FLUSH_MS = 1;

interface Compiled {
  readonly grammar: XHandle;
  readonly spare: XMatcher[];
  numSessions: number;
}

interface Session {
  readonly compiled: Compiled;
  readonly matcher: XMatcher;
  readonly stopIds: readonly number[];
  readonly mask: Int32Array;
}

/** Bytes that UTF-8 never uses: their tokens must not reach the matcher (see grammar-writer). */
function isImpossible(byte: number): boolean {
  return byte === 0xc0 || byte === 0xc1 || byte >= 0xf5;
}

export class GrammarHost {
  readonly #load: XLoader;
  readonly #vocabulary: Vocabulary;
  readonly #post: (message: FromWorker) => void;
  readonly #sessions = new Map<number, Session>();
  /** By grammar text, the last used at the end. */
  readonly #grammars = new Map<string, Compiled>();
  #instance: XInstance | undefined;
  #compiler: XCompiler | undefined;
  #trial: XInstance | undefined;
  #work: Promise<void> = Promise.resolve();

  constructor(load: XLoader, vocabulary: Vocabulary, post: (message: FromWorker) => void) {
    this.#load = load;
    this.#vocabulary = vocabulary;
    this.#post = post;
  }

  /** Messages are worked on one behind the other. */
  handle(message: ToWorker): Promise<void> {
    this.#work = this.#work.then(() => this.#handle(message));
    return this.#work;
  }

  async #handle(message: ToWorker): Promise<void> {
    switch (message.type) {
      case 'open':
        return await this.#open(message);
      case 'advance':
        return await this.#advance(message.steps);
      case 'close':
        return this.#close(message.session);
    }
  }

  async #open(message: ToWorker & { type: 'open' }): Promise<void> {
    const { session, ebnf, isForeign, stopIds, mask, accepted } = message;
    try {
      if (isForeign && !this.#grammars.has(ebnf)) {
        const problem = await this.#problemOf(ebnf);
        if (problem !== undefined) {
          return this.#post({ type: 'refused', session, reason: problem });
        }
      }
      const compiled = await this.#compiled(ebnf, session);
      const matcher = await this.#matcherOf(compiled);
      compiled.numSessions += 1;
      this.#sessions.set(session, {
        compiled,
        matcher,
        stopIds,
        mask: new Int32Array(mask),
      });
      const status = await this.#step({ session, tokens: accepted });
      this.#post({ type: 'masks', results: [{ session, status }] });
    } catch (error) {
      this.#break(session, error);
    }
  }

  /** Why a caller's grammar cannot be used. A bad one costs an instance that nobody uses. */
  async #problemOf(ebnf: string): Promise<string | undefined> {
    this.#trial ??= this.#load();
    const trial = this.#trial;
    try {
      (await trial.api.Grammar.fromEBNF(ebnf)).dispose();
      return undefined;
    } catch (error) {
      this.#trial = undefined;
      return trial.lastReason() || String(error);
    }
  }

  async #compiled(ebnf: string, session: number): Promise<Compiled> {
    const known = this.#grammars.get(ebnf);
    if (known !== undefined) {
      this.#grammars.delete(ebnf);
      this.#grammars.set(ebnf, known);
      return known;
    }
    this.#post({ type: 'compiling', session });
    const compiler = await this.#ready();
    const compiled = {
      grammar: await compiler.compileGrammar(ebnf),
      spare: [],
      numSessions: 0,
    };
    this.#grammars.set(ebnf, compiled);
    this.#evict(compiled);
    return compiled;
  }

  async #ready(): Promise<XCompiler> {
    if (this.#compiler !== undefined) return this.#compiler;
    this.#instance = this.#load();
    const { TokenizerInfo, GrammarCompiler } = this.#instance.api;
    const tokens = tokensOf(this.#vocabulary);
    // One token more than there are stands for the end: which tokens end an answer differs from
    // session to session, and the matcher leaves out stop tokens that it learns of later.
    const end = tokens.length;
    tokens.push(new Uint8Array(0));
    const info = await TokenizerInfo.createTokenizerInfo(tokens, 'raw', false, end + 1, [end]);
    // Our own cache is bounded; the compiler's is not.
    this.#compiler = await GrammarCompiler.createGrammarCompiler(info, false);
    return this.#compiler;
  }

  // Matchers are used again: making one leaves a few bytes behind in the WebAssembly heap.
  async #matcherOf(compiled: Compiled): Promise<XMatcher> {
    const spare = compiled.spare.pop();
    if (spare !== undefined) return spare;
    const instance = this.#instance;
    if (instance === undefined) throw new Error('no matcher is loaded');
    return await instance.api.GrammarMatcher.createGrammarMatcher(compiled.grammar);
  }

  // `added` has no session yet, but is about to.
  #evict(added: Compiled): void {
    let extra = this.#grammars.size - MOST_GRAMMARS;
    for (const [ebnf, compiled] of this.#grammars) {
      if (extra <= 0) return;
      if (compiled.numSessions > 0 || compiled === added) continue;
      this.#grammars.delete(ebnf);
      for (const matcher of compiled.spare) matcher.dispose();
      compiled.grammar.dispose();
      extra -= 1;
    }
  }

  async #advance(steps: readonly SessionStep[]): Promise<void> {
    let results: { session: number; status: MaskStatus }[] = [];
    let flushed = performance.now();
    for (const step of steps) {
      if (!this.#sessions.has(step.session)) continue; // closed meanwhile
      try {
        results.push({ session: step.session, status: await this.#step(step) });
      } catch (error) {
        return this.#break(step.session, error);
      }
      if (performance.now() - flushed > FLUSH_MS) {
        this.#post({ type: 'masks', results });
        results = [];
        flushed = performance.now();
      }
    }
    if (results.length > 0) this.#post({ type: 'masks', results });
  }

  async #step({ session, tokens }: SessionStep): Promise<MaskStatus> {
    const found = this.#sessions.get(session);
    if (found === undefined) return 'ended';
    const { matcher, mask, stopIds } = found;
    for (const token of tokens) {
      if (stopIds.includes(token)) return 'ended';
      if (!matcher.acceptToken(token)) return 'rejected';
    }
    const next = await matcher.getNextTokenBitmask();
    const end = this.#vocabulary.offsets.length - 1;
    const mayEnd = isSet(next, end);
    // Whatever stands behind the last token, too: a mask without tokens must be seen as empty.
    next[end >> 5] = (next[end >> 5] ?? 0) & ((1 << (end & 31)) - 1);
    mask.set(next.subarray(0, mask.length));
    if (mayEnd) for (const id of stopIds) mask[id >> 5] = (mask[id >> 5] ?? 0) | (1 << (id & 31));
    return mask.some((word) => word !== 0) ? 'ready' : 'stuck';
  }

  #close(session: number): void {
    const found = this.#sessions.get(session);
    if (found === undefined) return;
    this.#sessions.delete(session);
    const { compiled, matcher } = found;
    compiled.numSessions -= 1;
    if (compiled.spare.length >= MOST_SPARE) {
      matcher.dispose();
      return;
    }
    matcher.reset();
    compiled.spare.push(matcher);
  }

  #break(session: number, error: unknown): void {
    const reason = this.#instance?.lastReason() || String(error);
    this.#post({ type: 'broken', session, reason });
  }
}

function isSet(mask: Int32Array, bit: number): boolean {
  return (((mask[bit >> 5] ?? 0) >>> (bit & 31)) & 1) === 1;
}

/** The matcher's tokens; one with a byte that no text holds becomes one that is never drawn. */
function tokensOf({ bytes, offsets }: Vocabulary): Uint8Array[] {
  const none = new Uint8Array(0);
  return Array.from({ length: offsets.length - 1 }, (_, id) => {
    const token = bytes.slice(offsets[id], offsets[id + 1]);
    return token.some(isImpossible) ? none : token;
  });
}
