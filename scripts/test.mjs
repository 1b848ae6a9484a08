// `npm test`: everything, from a fresh clone: install, build, types, lint, layers, package, native
// tests, TypeScript tests, end to end. All steps run, so that one failure does not hide another;
// only a failed build ends it early. Last comes a summary with the sums of passed and failed.
import { spawnSync } from 'node:child_process';
import { readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { prepare, root, run } from './lib.mjs';

const scratch = join(root, 'build', 'test-results');
const results = [];
const counts = { passed: 0, failed: 0, skipped: 0 };
const bin = (path) => join('node_modules', path);

step('install', () => prepare.install(), { vital: true });
step('native build', () => prepare.native({ force: true }), { vital: true });
step('TypeScript build', () => prepare.typescript(), { vital: true });
step('types', () =>
  run('node', [bin('typescript/bin/tsc'), '-p', 'tsconfig.test.json', '--noEmit']),
);
step('biome', () => run('node', [bin('@biomejs/biome/bin/biome'), 'check', '.']));
step('layers', () => run('node', ['scripts/check-layers.mjs']));
step('clang-format', () => run('node', ['scripts/clang-format.mjs']));
step('package', () => run('node', ['scripts/check-package.mjs']));
step('native tests', ctest);
step('library tests', () => vitest('lib'));
step('end-to-end tests', () => vitest('e2e'));
finish();

function step(name, action, { vital = false } = {}) {
  console.error(`\n== ${name}`);
  const started = performance.now();
  const status = action();
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  results.push({ name, status, seconds });
  if (status !== 0 && vital) finish();
}

function ctest() {
  const command = ['--test-dir', 'build', '--output-on-failure', '--no-tests=error'];
  const { status, stdout } = spawnSync('ctest', command, {
    cwd: root,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  process.stdout.write(stdout ?? '');
  const [, failed, total] = /(\d+) tests? failed out of (\d+)/.exec(stdout ?? '') ?? [];
  const skipped = (stdout ?? '').match(/\*\*\*Skipped/g)?.length ?? 0;
  counts.failed += Number(failed ?? 0);
  counts.skipped += skipped;
  counts.passed += Number(total ?? 0) - Number(failed ?? 0) - skipped;
  return status ?? 127;
}

function vitest(project) {
  const report = join(scratch, `${project}.json`);
  rmSync(report, { force: true });
  const status = run('node', [
    bin('vitest/vitest.mjs'),
    'run',
    `--project=${project}`,
    '--reporter=default',
    '--reporter=json',
    `--outputFile.json=${report}`,
  ]);
  try {
    const { numPassedTests, numFailedTests, numPendingTests } = JSON.parse(
      readFileSync(report, 'utf8'),
    );
    counts.passed += numPassedTests;
    counts.failed += numFailedTests;
    counts.skipped += numPendingTests;
  } catch (error) {
    console.error(`no vitest report for ${project}: ${error.message}`);
    return status || 1;
  }
  return status;
}

function finish() {
  console.log('\n== summary');
  for (const { name, status, seconds } of results) {
    console.log(`${status === 0 ? 'ok  ' : 'FAIL'} ${name} (${seconds} s)`);
  }
  const failedSteps = results.filter(({ status }) => status !== 0).length;
  // A failed step without a failed test (a build, a lint) still counts as one failure.
  const failed = Math.max(counts.failed, failedSteps);
  console.log(`${counts.passed} passed, ${failed} failed, ${counts.skipped} skipped`);
  process.exit(failed === 0 ? 0 : 1);
}
