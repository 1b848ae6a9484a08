// The parts of xgrammar's WebAssembly build that are used, as types, and how it is loaded. Its
// package does not import in Node as published: the text is CommonJS, the package says ES modules.
// So the text is run as it is, wherever it lies; scripts/build-ts.mjs puts it into dist/vendor.
// It is compiled without exceptions: what it refuses ends the instance, with the reason printed.
// Runs on the grammar worker's thread.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname } from 'node:path';
import { Script } from 'node:vm';

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

/** Loads fresh instances of the CommonJS text at `path`; writes no file, prints nothing. */
export function makeLoader(path: string): XLoader {
  const require = createRequire(path);
  // Text that is run has no import() but behind an experimental option of Node's.
  const text = readFileSync(path, 'utf8').replaceAll(
    "import('module')",
    "Promise.resolve(require('module'))",
  );
  const wrapper = new Script(
    `(function (exports, require, module, __filename, __dirname, console) {${text}\n})`,
    { filename: path },
  );
  const printed: string[] = [];
  const note = (...parts: readonly unknown[]): void => {
    printed.push(parts.map(String).join(' '));
    if (printed.length > 8) printed.shift();
  };
  const quiet = { ...console, error: note, warn: note };
  return () => {
    const run: CommonJsText = wrapper.runInThisContext();
    const module: { exports: Partial<Xgrammar> } = { exports: {} };
    run.call(module.exports, module.exports, require, module, path, dirname(path), quiet);
    return { api: whole(module.exports, path), lastReason: () => reasonIn(printed) };
  };
}

type CommonJsText = (
  exports: object,
  require: NodeJS.Require,
  module: object,
  filename: string,
  dirname: string,
  console: Console,
) => void;

function whole(parts: Partial<Xgrammar>, path: string): Xgrammar {
  const { Grammar, TokenizerInfo, GrammarCompiler, GrammarMatcher } = parts;
  if (!Grammar || !TokenizerInfo || !GrammarCompiler || !GrammarMatcher) {
    throw new Error(`${path} is not xgrammar's module: an export is missing`);
  }
  return { Grammar, TokenizerInfo, GrammarCompiler, GrammarMatcher };
}

// [FATAL] /path/file.cc:12: EBNF parser error at line 1, column 2: …
function reasonIn(lines: readonly string[]): string {
  const line = lines.findLast((each) => each.includes('[FATAL]')) ?? '';
  return line
    .replace(/^.*\[FATAL\]\s+\S+:\d+:\s*/, '')
    .replace(/\s+/g, ' ')
    .trim();
}
