// Where end-to-end tests find things, and how they run a child process on the built package.
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

export const root: string = resolve(dirname(fileURLToPath(import.meta.url)), '../../..');
export const embedded: string = join(root, 'models', 'tiny-internvl');
export const cli: string = join(root, 'dist', 'cli', 'main.js');
export const distUrl: string = pathToFileURL(join(root, 'dist', 'index.js')).href;

export function fixture(name: string): string {
  return join(root, 'test', 'fixtures', 'tiny-internvl', name);
}

/** The dense variant, which is not in the repository; undefined where it is absent. */
export function findBf16(): string | undefined {
  const given = process.env.TURBOMIND_FIXTURES;
  const places = given
    ? [given, join(given, 'tiny-internvl'), join(given, 'models/tiny-internvl')]
    : [];
  return [...places, join(root, '../shared/models/tiny-internvl')]
    .map((place) => join(place, 'bf16'))
    .find((place) => existsSync(join(place, 'config.json')));
}

export interface Finished {
  readonly stdout: string;
  readonly stderr: string;
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

export interface ChildOptions {
  readonly env?: Record<string, string>;
  readonly input?: string;
  /** Called once the child has printed something. */
  readonly onOutput?: (child: ChildProcess) => void;
}

/** Runs node to its end. */
export function runNode(args: readonly string[], options: ChildOptions = {}): Promise<Finished> {
  const child = spawn(process.execPath, args, {
    cwd: root,
    env: { ...process.env, NODE_OPTIONS: '', ...options.env },
  });
  let stdout = '';
  let stderr = '';
  let told = false;
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
    if (!told) options.onOutput?.(child);
    told = true;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  child.stdin.end(options.input ?? '');
  return new Promise((done, fail) => {
    child.on('error', fail);
    child.on('close', (code, signal) => done({ stdout, stderr, code, signal }));
  });
}

/** Runs an ES module text that can `import { pipeline } from LIB`. */
export function runModule(text: string, options: ChildOptions = {}, flags: readonly string[] = []) {
  const source = text.replaceAll('LIB', JSON.stringify(distUrl));
  return runNode([...flags, '--input-type=module', '-e', source], options);
}
