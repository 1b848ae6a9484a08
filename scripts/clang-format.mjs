// Formats native code: --write changes files, else differences are listed and the exit status is
// 1. Uses the clang-format of node_modules or of the system; SKIP where there is none.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join, relative } from 'node:path';
import { has, root, walk } from './lib.mjs';

const local = join(root, 'node_modules', '.bin', 'clang-format');
const tool = existsSync(local) ? local : 'clang-format';
if (!has(tool)) {
  console.log('clang-format: SKIP: no clang-format on this machine');
  process.exit(0);
}
const source = (name) => /\.(cc|h|cu|cuh)$/.test(name);
const files = [
  ...walk(join(root, 'native'), source),
  ...walk(join(root, 'test', 'native'), source),
];
const write = process.argv.includes('--write');
const mode = write ? ['-i'] : ['--dry-run', '--Werror'];
const failed = files.filter((file) => {
  const { status } = spawnSync(tool, ['--style=file', ...mode, file], {
    cwd: root,
    stdio: 'ignore',
  });
  return status !== 0;
});
for (const file of failed) console.error(`${relative(root, file)}: not formatted`);
console.log(`clang-format: ${files.length} files, ${failed.length} not formatted`);
process.exit(failed.length === 0 ? 0 : 1);
