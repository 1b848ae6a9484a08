// lib/*.ts → dist/: ES modules and types by tsc, and one line of CommonJS that requires them, so
// that both worlds share one copy of every class.
import { chmodSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { root, run } from './lib.mjs';

const dist = join(root, 'dist');
rmSync(dist, { recursive: true, force: true });
const status = run('node', ['node_modules/typescript/bin/tsc', '-p', 'tsconfig.json']);
if (status !== 0) process.exit(status);

writeFileSync(join(dist, 'index.cjs'), "module.exports = require('./index.js');\n");
// The same declarations, seen from CommonJS: `import type` of an ES module needs its mode named.
const names = exportedNames(readFileSync(join(dist, 'index.d.ts'), 'utf8'));
writeFileSync(join(dist, 'index.d.cts'), commonJsTypes(names));
chmodSync(join(dist, 'cli', 'main.js'), 0o755);

function exportedNames(text) {
  const names = { types: [], values: [] };
  for (const [, isType, list] of text.matchAll(/export (type )?\{([^}]*)\}/g)) {
    for (const name of list.split(',').map((each) => each.trim())) {
      if (name.startsWith('type ')) names.types.push(name.slice(5));
      else if (name) (isType ? names.types : names.values).push(name);
    }
  }
  return names;
}

function commonJsTypes({ types, values }) {
  const mode = "{ with: { 'resolution-mode': 'import' } }";
  const from = "from './index.js' with { 'resolution-mode': 'import' }";
  const lines = [`export type { ${types.join(', ')} } ${from};`];
  for (const name of values) {
    lines.push(`export declare const ${name}: typeof import('./index.js', ${mode}).${name};`);
    if (/^[A-Z]/.test(name)) {
      lines.push(`export type ${name} = import('./index.js', ${mode}).${name};`);
    }
  }
  return `${lines.join('\n')}\n`;
}
