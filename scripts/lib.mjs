// What the scripts share: running a command in the repository, finding files, telling steps.
import { spawnSync } from 'node:child_process';
import { existsSync, lstatSync, readdirSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(fileURLToPath(import.meta.url)));

/** Runs a command in the repository with its output shown; returns its exit status. */
export function run(command, args, options = {}) {
  console.error(`$ ${[command, ...args].join(' ')}`);
  const { status, signal, error } = spawnSync(command, args, {
    cwd: root,
    stdio: 'inherit',
    ...options,
  });
  if (error) {
    console.error(`${command}: ${error.message}`);
    return 127;
  }
  return status ?? (signal ? 128 : 1);
}

/** Runs a command whose output is wanted; throws when it fails. */
export function capture(command, args, options = {}) {
  const result = spawnSync(command, args, { cwd: root, encoding: 'utf8', ...options });
  if (result.error) throw result.error;
  if (result.status !== 0) {
    throw new Error(`${command} ${args.join(' ')} failed:\n${result.stdout}${result.stderr}`);
  }
  return result.stdout;
}

/** True where the command can be started. */
export function has(command, args = ['--version']) {
  return spawnSync(command, args, { stdio: 'ignore' }).status === 0;
}

/** Files below a folder that `wanted` accepts by name. */
export function walk(folder, wanted = () => true) {
  if (!existsSync(folder)) return [];
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) return walk(path, wanted);
    return wanted(entry.name) ? [path] : [];
  });
}

/** True when `target` is missing or older than one of the sources. */
export function isStale(target, sources) {
  if (!existsSync(target)) return true;
  const built = statSync(target).mtimeMs;
  return sources.some((source) => existsSync(source) && statSync(source).mtimeMs > built);
}

const native = () => [
  join(root, 'CMakeLists.txt'),
  ...walk(join(root, 'native'), (name) => /\.(cc|h|cu|cuh|json|txt)$/.test(name)),
];
const typescript = () => [
  join(root, 'package.json'),
  join(root, 'tsconfig.json'),
  ...walk(join(root, 'lib'), (name) => name.endsWith('.ts')),
];

/** Steps that bring a fresh clone, or a changed one, up to date. Each returns an exit status. */
export const prepare = {
  install() {
    // A linked node_modules belongs to another checkout, which looks after it.
    const folder = join(root, 'node_modules');
    if (existsSync(folder) && lstatSync(folder).isSymbolicLink()) return 0;
    const lock = join(root, 'package-lock.json');
    const installed = join(root, 'node_modules', '.package-lock.json');
    return isStale(installed, [lock]) ? run('npm', ['ci', '--no-audit', '--no-fund']) : 0;
  },
  // Without `force` only the addon, and only where it is stale; else the native tests as well.
  native({ force = false } = {}) {
    const addon = join(root, 'build', 'Release', 'turbomind.node');
    if (!force && !isStale(addon, native())) return 0;
    // The CUDA backend takes minutes to compile: here only where a GPU can run it.
    const cuda = has('nvidia-smi', ['-L']) ? 'ON' : 'OFF';
    const args = ['run', '--silent', 'build:native', '--', `--CDTURBOMIND_CUDA=${cuda}`];
    if (!force && cuda === 'OFF') args.push('--target', 'turbomind');
    return run('npm', args, { stdio: ['ignore', 2, 2] });
  },
  typescript() {
    const output = join(root, 'dist', 'index.cjs');
    return isStale(output, typescript()) ? run('node', ['scripts/build-ts.mjs']) : 0;
  },
};
