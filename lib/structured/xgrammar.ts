// The parts of xgrammar's WebAssembly build that are used, as types, and how it is loaded. Its
// package does not import in Node as published, so scripts/build-ts.mjs copies it as CommonJS.
// It is compiled without exceptions: what it refuses ends the instance, with the reason printed.
// Runs on the grammar worker's thread.
import { createRequire } from 'node:module';

export interface XHandle {
  dispose(): void;
}

export interface XMatcher extends XHandle {
  /** False when the grammar does not allow the token here. */
  acceptToken(token: number): boolean;
  /** One bit a token, [ceil(vocabSize / 32)]. */
  getNextTokenBitmask(): Promise<Int32Array>;
  reset(): void;
}

export interface XCompiler extends XHandle {
  compileGrammar(ebnf: string): Promise<XHandle>;
}

export interface Xgrammar {
  readonly Grammar: { fromEBNF(ebnf: string): Promise<XHandle> };
  readonly TokenizerInfo: {
    createTokenizerInfo(
      vocabulary: readonly Uint8Array[],
      kind: 'raw',
      prependSpace: boolean,
      vocabSize: number,
      stopIds: readonly number[],
    ): Promise<XHandle>;
  };
  readonly GrammarCompiler: {
    createGrammarCompiler(info: XHandle, isCached: boolean): Promise<XCompiler>;
  };
  readonly GrammarMatcher: {
    createGrammarMatcher(grammar: XHandle): Promise<XMatcher>;
  };
}

/** A WebAssembly instance of its own, and what it printed when it gave up. */
export interface XInstance {
  readonly api: Xgrammar;
  /** The reason of the last refusal, without file names. */
  lastReason(): string;
}

export type XLoader = () => XInstance;

/** Loads fresh instances of the module at `path`. Takes over this thread's console.error. */
export function makeLoader(path: string): XLoader {
  const require = createRequire(import.meta.url);
  const printed: string[] = [];
  const note = (...parts: readonly unknown[]): void => {
    printed.push(parts.map(String).join(' '));
    if (printed.length > 8) printed.shift();
  };
  console.error = note;
  console.warn = note;
  return () => {
    delete require.cache[require.resolve(path)];
    const api: Xgrammar = require(path);
    return { api, lastReason: () => reasonIn(printed) };
  };
}

// [FATAL] /path/file.cc:12: EBNF parser error at line 1, column 2: …
function reasonIn(lines: readonly string[]): string {
  const line = lines.findLast((each) => each.includes('[FATAL]')) ?? '';
  return line
    .replace(/^.*\[FATAL\]\s+\S+:\d+:\s*/, '')
    .replace(/\s+/g, ' ')
    .trim();
}
