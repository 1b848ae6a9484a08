// The fixture folders of scripts/make-fixtures.py, read by lib/checkpoint: it must hand over exactly
// the spec and tensor table that the script, which shares no code with us, wrote to native.json.

import { readdirSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openCheckpoint } from '../../lib/checkpoint/checkpoint.js';

const ROOT = join(import.meta.dirname, '..', 'fixtures', 'models');
const FOLDERS = readdirSync(ROOT, { withFileTypes: true })
  .filter((entry) => entry.isDirectory() && entry.name !== 'tokenizer')
  .map((entry) => entry.name);

const byName = (a: { name: string }, b: { name: string }): number => (a.name < b.name ? -1 : 1);

describe.each(FOLDERS)('fixture %s', (folder) => {
  test('is read as the spec and tensor table of native.json', async () => {
    const wanted: unknown = JSON.parse(readFileSync(join(ROOT, folder, 'native.json'), 'utf8'));
    const { spec, files, tensors } = await openCheckpoint(join(ROOT, folder));
    const order = files.map((path) => basename(path));
    expect({ spec, files: order, tensors: [...tensors].sort(byName) }).toEqual(wanted);
  });
});
