// What npm would publish: packs it, checks the files it must and must not hold, and lets publint
// and @arethetypeswrong/cli judge exports and types. Exits 1 at the first complaint.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { capture, root, run } from './lib.mjs';

const MAX_PACKED_MIB = 40;
const REQUIRED = [
  'package.json',
  'README.md',
  'LICENSE',
  'dist/index.js',
  'dist/index.cjs',
  'dist/index.d.ts',
  'dist/index.d.cts',
  'dist/cli/main.js',
  'dist/structured/grammar-worker.js',
  'dist/vendor/web-xgrammar.cjs',
  'dist/vendor/NOTICE.txt',
  'models/tiny-internvl/config.json',
  'models/tiny-internvl/model.safetensors',
  'models/tiny-internvl/tokenizer.json',
  'models/tiny-internvl/LICENSE',
  'native/sources.json',
  'CMakeLists.txt',
  'binding.gyp',
];
const FORBIDDEN = [/^test\//, /^build/, /node_modules/, /\.log$/, /^\.ci/, /golden/];

const folder = mkdtempSync(join(tmpdir(), 'turbomind-pack-'));
let failures = 0;
try {
  const packed = JSON.parse(capture('npm', ['pack', '--json', '--pack-destination', folder]))[0];
  const files = packed.files.map(({ path }) => path);
  for (const file of REQUIRED) if (!files.includes(file)) fail(`the package lacks ${file}`);
  for (const file of files) {
    if (FORBIDDEN.some((pattern) => pattern.test(file))) fail(`the package must not hold ${file}`);
  }
  const size = packed.size / 2 ** 20;
  console.log(`check-package: ${files.length} files, ${size.toFixed(1)} MiB packed`);
  if (size > MAX_PACKED_MIB) fail(`${size.toFixed(1)} MiB are more than ${MAX_PACKED_MIB}`);
  const tarball = join(folder, packed.filename);
  if (run('node', [bin('publint', 'src/cli.js'), 'run', tarball, '--strict'])) fail('publint');
  if (run('node', [bin('@arethetypeswrong/cli', 'dist/index.js'), tarball])) fail('attw');
} finally {
  rmSync(folder, { recursive: true, force: true });
}
process.exit(failures === 0 ? 0 : 1);

function bin(name, file) {
  return join(root, 'node_modules', name, file);
}

function fail(text) {
  failures += 1;
  console.error(`check-package: ${text}`);
}
