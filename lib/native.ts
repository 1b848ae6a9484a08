// The only file that knows the addon exists: which candidates there are, in which order they are
// tried, why each was refused. Loading is lazy, so that importing the package never throws.
// Runs on whichever JS thread asks; every worker loads the same file once more.
import { existsSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import {
  BackendNotFoundError,
  type LoadAttempt,
  NATIVE_ERROR_CODES,
  TurbomindError,
  type TurbomindErrorCode,
} from './errors.js';
import type { NativeAddon } from './native-types.js';

const require = createRequire(import.meta.url);

/** Environment variable naming the one binary to load. */
export const NATIVE_PATH_VARIABLE = 'TURBOMIND_NATIVE';

/** A loaded addon, its file and the candidates that failed before it. */
export interface LoadedNative {
  readonly addon: NativeAddon;
  readonly path: string;
  readonly attempts: readonly LoadAttempt[];
}

/** Where and as which version to look for binaries. */
export interface NativeSearch {
  /** Folder of this package: holds build/, prebuilds/ and package.json. */
  readonly root: string;
  readonly version: string;
  readonly env: Readonly<Record<string, string | undefined>>;
}

/** Folder of this package, out of an Electron archive where native files and models are real. */
export function packageRoot(): string {
  return unpackAsar(resolve(dirname(fileURLToPath(import.meta.url)), '..'));
}

/** Version of this package. */
export function packageVersion(): string {
  const manifest: { version: string } = require('../package.json');
  return manifest.version;
}

/** Electron's archive holds no real files: libraries and mapped weights live beside it. */
export function unpackAsar(path: string): string {
  return path.replace(/app\.asar(?=$|[\\/])/, 'app.asar.unpacked');
}

let loaded: LoadedNative | undefined;

/**
 * The native addon, loaded at the first call.
 * @throws BackendNotFoundError with every candidate and its reason.
 */
export function loadNative(): LoadedNative {
  loaded ??= findNative({ root: packageRoot(), version: packageVersion(), env: process.env });
  return loaded;
}

/** Tries the candidates in order; the uncached core of `loadNative`. */
export function findNative(search: NativeSearch): LoadedNative {
  const attempts: LoadAttempt[] = [];
  for (const path of candidates(search, attempts)) {
    const outcome = tryLoad(path, search.version);
    if (typeof outcome !== 'string') return { addon: outcome, path, attempts };
    attempts.push({ path, reason: outcome });
  }
  throw notFound(search, attempts);
}

function* candidates(search: NativeSearch, attempts: LoadAttempt[]): Generator<string> {
  const explicit = search.env[NATIVE_PATH_VARIABLE];
  if (explicit) {
    yield resolve(explicit);
    return;
  }
  yield join(search.root, 'build', 'Release', 'turbomind.node');
  const prebuild = findPrebuild(search.root);
  if (prebuild.path) yield prebuild.path;
  else attempts.push({ path: join(search.root, 'prebuilds'), reason: prebuild.reason });
  const platformPackage = resolvePlatformPackage();
  if (platformPackage.path) yield unpackAsar(platformPackage.path);
  else attempts.push({ path: platformPackage.name, reason: platformPackage.reason });
}

interface Found {
  readonly path?: string;
  readonly reason: string;
}

// The parts of node-gyp-build that choose a file of prebuilds/. Its `path()` would answer with
// build/Release first, and a broken local build would hide a prebuild that works.
interface PrebuildTuple {
  readonly name: string;
}
interface PrebuildTags {
  readonly file: string;
}
interface NodeGypBuild {
  parseTuple(name: string): PrebuildTuple | undefined;
  matchTuple(platform: string, arch: string): (tuple: PrebuildTuple | undefined) => boolean;
  parseTags(file: string): PrebuildTags | undefined;
  matchTags(runtime: string, abi: string): (tags: PrebuildTags | undefined) => boolean;
  compareTags(runtime: string): (a: PrebuildTags, b: PrebuildTags) => number;
}

function findPrebuild(root: string): Found {
  const rules: NodeGypBuild = require('node-gyp-build');
  const folder = join(root, 'prebuilds');
  const target = `${process.platform}-${process.arch}`;
  const matches = rules.matchTuple(process.platform, process.arch);
  const tuple = listFolder(folder).find((name) => matches(rules.parseTuple(name)));
  if (tuple === undefined) return { reason: `no folder for ${target}` };
  const runtime = process.versions.electron === undefined ? 'node' : 'electron';
  const fits = rules.matchTags(runtime, process.versions.modules);
  const tags = listFolder(join(folder, tuple))
    .map((file) => rules.parseTags(file))
    .filter((candidate): candidate is PrebuildTags => candidate !== undefined && fits(candidate))
    .sort(rules.compareTags(runtime));
  const best = tags[0];
  if (best === undefined) return { reason: `no file for ${target} and this C library` };
  return { path: join(folder, tuple, best.file), reason: '' };
}

function listFolder(folder: string): string[] {
  return existsSync(folder) ? readdirSync(folder) : [];
}

// One literal for each package, so that bundlers see them.
function resolvePlatformPackage(): Found & { readonly name: string } {
  const name = `@org/turbomind-node-${process.platform}-${process.arch}`;
  try {
    return { name, path: platformPackagePath(name), reason: '' };
  } catch (error) {
    return { name, reason: firstLine(error) };
  }
}

function platformPackagePath(name: string): string {
  switch (name) {
    case '@org/turbomind-node-linux-x64':
      return require.resolve('@org/turbomind-node-linux-x64/turbomind.node');
    case '@org/turbomind-node-linux-arm64':
      return require.resolve('@org/turbomind-node-linux-arm64/turbomind.node');
    case '@org/turbomind-node-darwin-arm64':
      return require.resolve('@org/turbomind-node-darwin-arm64/turbomind.node');
    case '@org/turbomind-node-win32-x64':
      return require.resolve('@org/turbomind-node-win32-x64/turbomind.node');
    default:
      throw new Error(`no package is published for ${process.platform}-${process.arch}`);
  }
}

/** Path of the CUDA backend library that goes with an addon; '' when there is none. */
export function findCudaLibrary(addonPath: string): string {
  const file = process.platform === 'win32' ? 'turbomind_cuda.dll' : 'libturbomind_cuda.so';
  const sibling = join(dirname(addonPath), file);
  if (existsSync(sibling)) return sibling;
  try {
    return unpackAsar(require.resolve('@org/turbomind-node-linux-x64-cuda/libturbomind_cuda.so'));
  } catch {
    return ''; // the optional package is not installed: the usual case
  }
}

// The addon, or why it cannot be used.
function tryLoad(path: string, version: string): NativeAddon | string {
  if (!existsSync(path)) return 'the file does not exist';
  try {
    const addon: unknown = require(path);
    if (!isAddon(addon))
      return 'the file loads but is not this addon: an expected export is missing';
    if (addon.version !== version) {
      return `the binary is of version ${addon.version}, this package is of version ${version}`;
    }
    return addon;
  } catch (error) {
    return firstLine(error);
  }
}

const ADDON_FUNCTIONS = [
  'cpuInfo',
  'queryCuda',
  'open',
  'estimate',
  'makeTiles',
  'hashBytes',
  'chooseGrid',
  'resizeBicubic',
] as const satisfies readonly (keyof NativeAddon)[];

function isAddon(value: unknown): value is NativeAddon {
  if (typeof value !== 'object' || value === null) return false;
  if (!('version' in value) || typeof value.version !== 'string') return false;
  const members = new Map<string, unknown>(Object.entries(value));
  return ADDON_FUNCTIONS.every((name) => typeof members.get(name) === 'function');
}

function firstLine(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.split('\n', 1)[0] ?? text;
}

function notFound(search: NativeSearch, attempts: readonly LoadAttempt[]): BackendNotFoundError {
  const tried = attempts.map(({ path, reason }) => `- ${path}: ${reason}`);
  const solutions = search.env[NATIVE_PATH_VARIABLE]
    ? [`- Unset ${NATIVE_PATH_VARIABLE}, or point it at a binary of version ${search.version}`]
    : [
        '- Build it in a clone of the repository: npm ci && npm run build:native (CMake, a C++20 compiler)',
        '- Reinstall without --ignore-scripts or --omit=optional, on the platform that will run it',
        `- Set ${NATIVE_PATH_VARIABLE} to the path of a turbomind.node of version ${search.version}`,
        '- Packaged with Electron: list this package under asarUnpack',
      ];
  const target = `${process.platform}-${process.arch}, Node ${process.versions.node}`;
  return new BackendNotFoundError(
    [
      `Could not load the native part of @org/turbomind-node (${target}). Tried:`,
      ...tried,
      'Possible solutions:',
      ...solutions,
    ].join('\n'),
    attempts,
  );
}

/** `code` if it is one that native code raises. */
export function nativeErrorCode(code: unknown): TurbomindErrorCode | undefined {
  return NATIVE_ERROR_CODES.find((known) => known === code);
}

/** What the addon threw, as the error class that users see. */
export function fromNative(error: unknown): TurbomindError {
  if (error instanceof TurbomindError) return error;
  const message = error instanceof Error ? error.message : String(error);
  const code = error instanceof Error && 'code' in error ? nativeErrorCode(error.code) : undefined;
  return new TurbomindError(code ?? 'ERR_TM_INTERNAL', message, { cause: error });
}
