// Reads the table "Who may include whom" of ARCHITECTURE.md and holds every #include of native/
// against it, with the further rules written below the table. lib/*.ts: only native.ts may load a
// .node file. Prints each violation; exits 1 when there is one.
import { readFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { root, walk } from './lib.mjs';

const violations = [];
const layers = readTable(readFileSync(join(root, 'ARCHITECTURE.md'), 'utf8'));
const native = join(root, 'native');
for (const path of walk(native, (name) => /\.(cc|h|cu|cuh|inc)$/.test(name))) checkNative(path);
for (const path of walk(join(root, 'lib'), (name) => name.endsWith('.ts'))) checkTypeScript(path);
for (const line of violations) console.error(line);
console.log(`check-layers: ${layers.size} layers, ${violations.length} violation(s)`);
process.exit(violations.length === 0 ? 0 : 1);

/** Layer → layers it may include, itself counted. */
function readTable(text) {
  const section = text.split(/^## /m).find((part) => part.startsWith('Who may include whom'));
  if (!section) throw new Error('ARCHITECTURE.md: no section "Who may include whom"');
  const table = new Map();
  for (const [, layer, list] of section.matchAll(/^\| `([^`]+)` \| ([^|]+) \|$/gm)) {
    const names = list.trim() === '–' ? [] : list.split(',').map((name) => name.trim());
    table.set(layer, new Set([layer, ...names]));
  }
  if (table.size < 8) throw new Error('ARCHITECTURE.md: the layer table could not be read');
  return table;
}

function layerOf(file) {
  const names = [...layers.keys()].sort((a, b) => b.length - a.length);
  return names.find((name) => file.startsWith(`${name}/`));
}

function checkNative(path) {
  const file = relative(native, path);
  const layer = layerOf(file);
  if (layer === undefined) return report(file, 0, 'lies in no layer of the table');
  readFileSync(path, 'utf8')
    .split('\n')
    .forEach((line, index) => {
      const [, quote, target] = /^\s*#\s*include\s*(["<])([^">]+)/.exec(line) ?? [];
      if (quote === '"') checkInclude(file, index + 1, layer, target);
      else if (quote === '<') checkSystemInclude(file, index + 1, layer, target);
    });
}

function checkInclude(file, line, layer, target) {
  const local = join(dirname(file), target);
  const wanted = layerOf(target) ?? layerOf(local);
  if (target === 'napi.h' || target === 'node_api.h')
    return checkSystemInclude(file, line, layer, target);
  if (wanted === undefined) return report(file, line, `includes ${target}, which is in no layer`);
  if (isException(file, target)) return;
  if (!layers.get(layer).has(wanted)) report(file, line, `${layer} may not include ${target}`);
  if (layer === 'addon' && wanted === 'backend/cpu')
    report(file, line, `addon: only backend/cpu/isa.h`);
  const pure =
    /^runtime\/(request|sequence|block_manager|prefix_index|image_store|step_plan|step_budget|swap_space|scheduler\w*|memory_plan|ngram|speculation|draft_planner)\./.test(
      file,
    );
  if (pure && /^(models|backend)/.test(wanted))
    report(file, line, `pure runtime includes ${target}`);
}

function isException(file, target) {
  if (file === 'backend/backends.cc') return /^backend\/(cpu|cuda)\//.test(target);
  return file.startsWith('addon/') && target === 'backend/cpu/isa.h';
}

function checkSystemInclude(file, line, layer, target) {
  if (
    /^cu(da|blas|rand|tlass)|^cooperative_groups|^mma\.h|^nccl/.test(target) &&
    layer !== 'backend/cuda'
  ) {
    report(file, line, `CUDA header ${target} outside backend/cuda`);
  }
  if (/^(napi|node_api|node|uv|v8)[^/]*\.h$/.test(target) && layer !== 'addon') {
    report(file, line, `Node header ${target} outside addon`);
  }
}

function checkTypeScript(path) {
  const file = relative(root, path);
  if (file === join('lib', 'native.ts')) return;
  // Requires the grammar matcher's module, which is JavaScript.
  if (file === join('lib', 'structured', 'xgrammar.ts')) return;
  readFileSync(path, 'utf8')
    .split('\n')
    .forEach((line, index) => {
      if (/createRequire|process\.dlopen|node-gyp-build|['"`][^'"`]*\.node['"`]/.test(line)) {
        report(file, index + 1, 'reaches for a binary; only lib/native.ts may');
      }
    });
}

function report(file, line, text) {
  violations.push(`${file}:${line}: ${text}`);
}
