// Builds the CPU addon for this platform into prebuilds/, as npm ships it. Run it through
// `npm run prebuilds`: node-gyp finds Node's headers only under npm.
import { run } from './lib.mjs';

const tool = 'node_modules/prebuildify/bin.js';
process.exit(
  run('node', [tool, '--napi', '--strip', '--tag-libc', `--target=node@${process.versions.node}`]),
);
