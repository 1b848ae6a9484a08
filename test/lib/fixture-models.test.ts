import { existsSync } from 'node:fs';
import { cp, readdir, readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { openCheckpoint } from '../../lib/checkpoint/checkpoint.js';
import type { ModelSpec, TensorEntry } from '../../lib/native-types.js';
import { temporaryFolder } from './model-folder.js';

/** What scripts/make-fixtures.py, which shares no code with us, says native code must be given. */
interface Expected {
  readonly spec: ModelSpec;
  readonly files: readonly string[];
  readonly tensors: readonly TensorEntry[];
}

const ROOT = fileURLToPath(new URL('../fixtures/models/', import.meta.url));

/** Tensors by name, with the file's name for its index: order and numbering are free. */
function table({ files, tensors }: Omit<Expected, 'spec'>) {
  return new Map(
    tensors.map(({ file, ...tensor }) => [
      tensor.name,
      { ...tensor, file: basename(files[file] ?? '') },
    ]),
  );
}

const isPresent = existsSync(ROOT);
const entries = isPresent ? await readdir(ROOT, { withFileTypes: true }) : [];
const models = entries.filter((entry) => entry.isDirectory() && entry.name !== 'tokenizer');

test.skipIf(!isPresent)('there are fixture models', () => {
  expect(models.length).toBeGreaterThanOrEqual(9);
});

test.each(models.map(({ name }) => name))(
  '%s opens as the script that wrote it says',
  async (name) => {
    const folder = await temporaryFolder();
    // All fixtures share one tokenizer; a model folder has its own.
    await cp(join(ROOT, 'tokenizer'), folder, { recursive: true });
    await cp(join(ROOT, name), folder, { recursive: true });
    const expected: Expected = JSON.parse(await readFile(join(folder, 'native.json'), 'utf8'));
    const checkpoint = await openCheckpoint(folder);
    expect(checkpoint.spec).toEqual(expected.spec);
    expect(table(checkpoint)).toEqual(table(expected));
  },
);
