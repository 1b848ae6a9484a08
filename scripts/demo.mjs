// `npm run demo`: from a fresh clone to an answer about a picture. Installs and builds what is
// missing or stale, then asks the embedded model through the command line.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { prepare, root } from './lib.mjs';

for (const [name, step] of [
  ['install', prepare.install],
  ['native build', prepare.native],
  ['TypeScript build', prepare.typescript],
]) {
  const status = step();
  if (status !== 0) {
    console.error(`demo: ${name} failed`);
    process.exit(status);
  }
}

const receipt = join('examples', 'receipt.png');
ask('Read the receipt.', receipt);
ask('What is the total?', receipt);
ask('What colour is the largest shape?', join('examples', 'shapes.png'));
ask('What is 27 + 45?');
ask('Reverse the word cat.');

function ask(prompt, image) {
  const args = ['dist/cli/main.js', 'run', '--prompt', prompt, '--json'];
  if (image) args.push('--image', image);
  const started = performance.now();
  const { status, stdout } = spawnSync(process.execPath, args, {
    cwd: root,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  if (status !== 0) {
    console.error('demo: the model did not answer');
    process.exit(status ?? 1);
  }
  const { text, usage, timings } = JSON.parse(stdout);
  console.log(`\n> ${image ? `[${image}] ` : ''}${prompt}\n${text}`);
  console.log(
    `  ${usage.promptTokens} prompt tokens; first token after ${timings.firstTokenMs.toFixed(0)} ms, ` +
      `whole process ${((performance.now() - started) / 1000).toFixed(2)} s`,
  );
}
