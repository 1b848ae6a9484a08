import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeEach, expect, test } from 'vitest';
import { BackendNotFoundError, NATIVE_ERROR_CODES } from '../../lib/errors.js';
import {
  findNative,
  fromNative,
  type NativeSearch,
  packageVersion,
  unpackAsar,
} from '../../lib/native.js';

const base = mkdtempSync(join(tmpdir(), 'turbomind-native-'));
const require = createRequire(import.meta.url);
let root = base;
let count = 0;

beforeEach(() => {
  root = join(base, String(count++));
  mkdirSync(root);
});
afterAll(() => rmSync(base, { recursive: true }));

function search(env: NativeSearch['env'] = {}): NativeSearch {
  return { root, version: '0.1.0', env };
}

function attemptsOf(action: () => unknown): BackendNotFoundError {
  try {
    action();
  } catch (error) {
    if (error instanceof BackendNotFoundError) return error;
    throw error;
  }
  throw new Error('something was loaded');
}

function write(...parts: string[]): string {
  const path = join(root, ...parts);
  mkdirSync(join(path, '..'), { recursive: true });
  writeFileSync(path, 'this is not a library');
  return path;
}

// `require` loads a .node file by dlopen; a .cjs file stands for one that loads.
function writeModule(version: string, names: readonly string[]): string {
  const path = join(root, 'addon.cjs');
  const functions = names.map((name) => `${name}() {}`).join(', ');
  writeFileSync(path, `module.exports = { version: '${version}', ${functions} };`);
  return path;
}
const EXPORTS = [
  'cpuInfo',
  'queryCuda',
  'open',
  'estimate',
  'makeTiles',
  'hashBytes',
  'chooseGrid',
  'resizeBicubic',
];

test('nothing there: every candidate is listed with its reason, and what to do', () => {
  const error = attemptsOf(() => findNative(search()));
  expect(error.code).toBe('ERR_TM_BACKEND_NOT_FOUND');
  expect(error.attempts.map(({ path }) => path)).toEqual([
    join(root, 'build', 'Release', 'turbomind.node'),
    join(root, 'prebuilds'),
    expect.stringContaining('@org/turbomind-node-'),
  ]);
  for (const { path, reason } of error.attempts) {
    expect(error.message).toContain(`- ${path}: ${reason}`);
    expect(reason).not.toBe('');
  }
  expect(error.message).toContain('Possible solutions:');
  expect(error.message).toContain('npm run build:native');
});

test('a broken local build does not hide the prebuilds', () => {
  const built = write('build', 'Release', 'turbomind.node');
  const tuple = `${process.platform}-${process.arch}`;
  const prebuilt = write('prebuilds', tuple, '@org+turbomind-node.node');
  const { attempts } = attemptsOf(() => findNative(search()));
  expect(attempts[0]).toMatchObject({ path: built });
  expect(attempts[1]).toMatchObject({ path: prebuilt });
  expect(attempts[0]?.reason).not.toContain('does not exist');
});

test('prebuilds for other platforms are not tried', () => {
  write('prebuilds', 'plan9-mips', 'x.node');
  const { attempts } = attemptsOf(() => findNative(search()));
  expect(attempts[1]?.reason).toContain(`no folder for ${process.platform}-${process.arch}`);
});

test('an explicit path is the only candidate', () => {
  write('build', 'Release', 'turbomind.node');
  const error = attemptsOf(() => findNative(search({ TURBOMIND_NATIVE: '/no/such.node' })));
  expect(error.attempts).toEqual([{ path: '/no/such.node', reason: 'the file does not exist' }]);
  expect(error.message).toContain('Unset TURBOMIND_NATIVE');
});

test('a binary of another version is refused with both versions', () => {
  const path = writeModule('9.9.9', EXPORTS);
  const { attempts } = attemptsOf(() => findNative(search({ TURBOMIND_NATIVE: path })));
  expect(attempts[0]?.reason).toContain('version 9.9.9');
  expect(attempts[0]?.reason).toContain('version 0.1.0');
});

test('a library that is not the addon is refused', () => {
  const path = writeModule('0.1.0', EXPORTS.slice(1));
  const { attempts } = attemptsOf(() => findNative(search({ TURBOMIND_NATIVE: path })));
  expect(attempts[0]?.reason).toContain('not this addon');
});

test('the first that fits is taken', () => {
  const path = writeModule('0.1.0', EXPORTS);
  const loaded = findNative(search({ TURBOMIND_NATIVE: path }));
  expect(loaded).toMatchObject({ path, attempts: [] });
  expect(loaded.addon).toBe(require(path));
});

test('files in an Electron archive are looked for beside it', () => {
  expect(unpackAsar('/opt/app.asar/node_modules/x')).toBe('/opt/app.asar.unpacked/node_modules/x');
  expect(unpackAsar('/opt/app.asar.unpacked/x')).toBe('/opt/app.asar.unpacked/x');
  expect(unpackAsar('/home/app.asarium/x')).toBe('/home/app.asarium/x');
});

test('native errors keep a known code, and others are internal', () => {
  for (const code of NATIVE_ERROR_CODES) {
    expect(fromNative(Object.assign(new Error('m'), { code }))).toMatchObject({
      code,
      message: 'm',
    });
  }
  expect(fromNative(new Error('m')).code).toBe('ERR_TM_INTERNAL');
  expect(fromNative('m')).toMatchObject({ code: 'ERR_TM_INTERNAL', message: 'm' });
});

test('the version is that of package.json', () => {
  expect(packageVersion()).toMatch(/^\d+\.\d+\.\d+/);
});

test('the native list of codes is the same as ours', () => {
  const source = readFileSync(new URL('../../native/base/error.cc', import.meta.url), 'utf8');
  const native = [...source.matchAll(/"(ERR_TM_[A-Z_]+)"/g)].map(([, code]) => code);
  expect([...new Set(native)].sort()).toEqual([...NATIVE_ERROR_CODES].sort());
});
