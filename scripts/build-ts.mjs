// lib/*.ts → dist/: ES modules and types by tsc, and one line of CommonJS that requires them, so
// that both worlds share one copy of every class.
import { chmodSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
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
vendorMatcher();
chmodSync(join(dist, 'cli', 'main.js'), 0o755);

// The grammar matcher is published as CommonJS text in a package that says it holds ES modules, so
// Node cannot import it from there. Its file is copied as it is, less the name of its source map.
function vendorMatcher() {
  const folder = join(root, 'node_modules', '@mlc-ai', 'web-xgrammar');
  const { version, license } = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'));
  if (license !== 'Apache-2.0') throw new Error(`web-xgrammar: its licence is ${license} now`);
  const text = readFileSync(join(folder, 'lib', 'index.js'), 'utf8');
  const vendor = join(dist, 'vendor');
  mkdirSync(vendor, { recursive: true });
  const code = text.replace(/\n\/\/# sourceMappingURL=.*\n?$/, '\n');
  writeFileSync(join(vendor, 'web-xgrammar.cjs'), code);
  writeFileSync(join(vendor, 'NOTICE.txt'), notice(version));
}

function notice(version) {
  return `web-xgrammar.cjs is lib/index.js of @mlc-ai/web-xgrammar ${version}
(https://github.com/mlc-ai/xgrammar), by the XGrammar contributors, renamed so that Node takes it for
CommonJS; the comment with its source map's name was taken out, nothing else was changed. It is
licensed under the Apache License, Version 2.0, whose text is the file LICENSE of this package.
`;
}

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
