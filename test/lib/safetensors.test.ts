import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  parseHeader,
  readSafetensorsHeader,
  readTensorStore,
} from '../../lib/checkpoint/safetensors.js';
import { TurbomindError } from '../../lib/errors.js';
import {
  expectError,
  headerOf,
  type TestTensor,
  temporaryFolder,
  writeRawSafetensors,
  writeSafetensors,
} from './model-folder.js';

const THREE: readonly TestTensor[] = [
  { name: 'a', dtype: 'F32', shape: [2, 3] },
  { name: 'b', dtype: 'BF16', shape: [] },
  { name: 'c', dtype: 'I64', shape: [0, 5] },
];

const CODE = 'ERR_TM_INVALID_CHECKPOINT';

/** Parses a header as of a file with `dataBytes` behind it. */
function parse(header: string, dataBytes: number) {
  const bytes = Buffer.from(header);
  return parseHeader(bytes, '/folder/model.safetensors', 8 + bytes.length + dataBytes);
}

describe('a header', () => {
  test('gives every tensor its place in the file', async () => {
    const path = join(await temporaryFolder(), 'three.safetensors');
    await writeSafetensors(path, THREE);
    const start = 8 + Buffer.byteLength(headerOf(THREE).json);
    const tensors = await readSafetensorsHeader(path);
    expect(new Map(tensors.map((tensor) => [tensor.name, tensor]))).toEqual(
      new Map([
        ['a', { name: 'a', dtype: 'F32', shape: [2, 3], file: path, offset: start, bytes: 24 }],
        ['b', { name: 'b', dtype: 'BF16', shape: [], file: path, offset: start + 24, bytes: 2 }],
        ['c', { name: 'c', dtype: 'I64', shape: [0, 5], file: path, offset: start + 26, bytes: 0 }],
      ]),
    );
  });

  test('may be padded with spaces and carry string metadata', () => {
    const { json } = headerOf([{ name: 'x', dtype: 'F16', shape: [4] }]);
    const padded = `${json.replace('{', '{"__metadata__":{"format":"pt"},')}    `;
    expect(parse(padded, 8).map((tensor) => tensor.name)).toEqual(['x']);
  });

  test('names a tensor __proto__ without harm', () => {
    const tensors = parse('{"__proto__":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4);
    expect(tensors).toMatchObject([{ name: '__proto__', bytes: 4 }]);
    expect(Object.hasOwn(Object.prototype, 'dtype')).toBe(false);
  });

  const entry = (fields: object) =>
    JSON.stringify({ x: { dtype: 'F32', shape: [2], data_offsets: [0, 8], ...fields } });
  const two = (first: number[], second: number[]) =>
    JSON.stringify({
      x: { dtype: 'U8', shape: [4], data_offsets: first },
      y: { dtype: 'U8', shape: [4], data_offsets: second },
    });

  test.each<[string, string, number, RegExp]>([
    ['is not JSON', '{"x":', 0, /not JSON/],
    ['is an array', '[]', 0, /does not begin with/],
    ['begins with a space', ' {}', 0, /does not begin with/],
    ['is empty', '', 0, /does not begin with/],
    ['names a tensor twice', `{"x":1,${entry({}).slice(1)}`, 8, /duplicate key/],
    ['hides the second name in an escape', `{"\\u0078":1,${entry({}).slice(1)}`, 8, /duplicate/],
    ['repeats a field', entry({}).replace('{"dtype"', '{"dtype":"U8","dtype"'), 8, /duplicate/],
    ['has metadata that is no map of strings', '{"__metadata__":{"a":1}}', 0, /__metadata__/],
    ['has an entry that is no object', '{"x":null}', 0, /"x" is not an object/],
    ['has an unknown dtype', entry({ dtype: 'F12' }), 8, /unknown dtype "F12"/],
    ['has a dtype of the prototype', entry({ dtype: 'constructor' }), 8, /unknown dtype/],
    ['has a negative size', entry({ shape: [-2] }), 8, /not a list of sizes/],
    ['has a fractional size', entry({ shape: [1.5] }), 8, /not a list of sizes/],
    ['has a size beyond 2^53', entry({ shape: [2 ** 60] }), 8, /not a list of sizes/],
    ['has a product beyond 2^53', entry({ shape: [2 ** 40, 2 ** 40] }), 8, /too many bytes/],
    ['has one offset', entry({ data_offsets: [0] }), 8, /two byte positions/],
    ['has offsets in reverse', entry({ data_offsets: [8, 0] }), 8, /behind its end/],
    ['has offsets that do not fit the shape', entry({ shape: [3] }), 8, /needs 12 bytes .* span 8/],
    ['reaches beyond the file', entry({}), 7, /truncated: tensor "x" ends/],
    ['leaves bytes behind the last tensor', entry({}), 9, /1 bytes behind its last tensor/],
    ['has overlapping tensors', two([0, 4], [2, 6]), 6, /"y" overlaps/],
    ['has two tensors in one place', two([0, 4], [0, 4]), 4, /overlaps/],
    ['has a hole', two([0, 4], [5, 9]), 9, /hole of 1 bytes before tensor "y"/],
    ['has a hole at the start', entry({ data_offsets: [4, 12] }), 12, /hole of 4 bytes/],
    ['has sub-byte sizes that fill no byte', entry({ dtype: 'F4', shape: [3] }), 8, /needs too/],
  ])('that %s is refused', async (_, header, dataBytes, message) => {
    await expectError(() => parse(header, dataBytes), CODE, message);
  });

  test('that is not UTF-8 is refused', async () => {
    const bytes = Buffer.from([0x7b, 0x22, 0xff, 0x22, 0x7d]);
    await expectError(() => parseHeader(bytes, 'x', 13), CODE, /not UTF-8/);
  });

  test('survives any bytes: it is parsed or refused with our error', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), fc.nat(300), (bytes, size) => {
        expectParsedOrRefused(() => parseHeader(bytes, 'x', size));
      }),
    );
  });

  test('survives any JSON', () => {
    const numbers = fc.array(fc.oneof(fc.nat(40), fc.integer(), fc.double()), { maxLength: 3 });
    const entries = fc.dictionary(
      fc.oneof(fc.string(), fc.constantFrom('__proto__', '__metadata__', 'constructor')),
      fc.oneof(
        fc.record({
          dtype: fc.oneof(fc.constantFrom('F32', 'U8', 'F4'), fc.string()),
          shape: numbers,
          data_offsets: numbers,
        }),
        fc.jsonValue(),
      ),
    );
    fc.assert(
      fc.property(entries, fc.nat(300), (json, size) => {
        expectParsedOrRefused(() => parse(JSON.stringify(json), size));
      }),
    );
  });

  test('of any tensors that lie side by side reads back', () => {
    const tensor = fc.record({
      name: fc.string().filter((name) => name !== '__metadata__'),
      dtype: fc.constantFrom('F32', 'F16', 'BF16', 'I32', 'I64'),
      shape: fc.array(fc.nat(5), { maxLength: 4 }),
    });
    fc.assert(
      fc.property(fc.uniqueArray(tensor, { selector: ({ name }) => name }), (tensors) => {
        const { json, dataBytes } = headerOf(tensors);
        const byName = (a: TestTensor, b: TestTensor) => (a.name < b.name ? -1 : 1);
        const read = parse(json, dataBytes).map(({ name, dtype, shape }) => ({
          name,
          dtype,
          shape,
        }));
        expect(read.sort(byName)).toEqual([...tensors].sort(byName));
      }),
    );
  });
});

function expectParsedOrRefused(action: () => unknown): void {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(TurbomindError);
  }
}

describe('a file', () => {
  test.each<[string, Uint8Array, RegExp]>([
    ['of no bytes', Buffer.alloc(0), /is 0 bytes long/],
    ['of seven bytes', Buffer.alloc(7), /is 7 bytes long/],
    ['of an absurd header length', Buffer.alloc(64, 0xff), /the limit is 100000000/],
    ['cut inside its header', Buffer.from([200, 0, 0, 0, 0, 0, 0, 0, 0x7b]), /truncated/],
  ])('%s is refused', async (_, bytes, message) => {
    const path = join(await temporaryFolder(), 'bad.safetensors');
    await writeFile(path, bytes);
    await expectError(() => readSafetensorsHeader(path), CODE, message);
  });

  test('cut inside its data is refused', async () => {
    const path = join(await temporaryFolder(), 'cut.safetensors');
    const { json, dataBytes } = headerOf(THREE);
    await writeRawSafetensors(path, json, dataBytes - 1);
    await expectError(() => readSafetensorsHeader(path), CODE, /truncated/);
  });

  test('that does not exist is refused', async () => {
    const path = join(await temporaryFolder(), 'none.safetensors');
    await expectError(() => readSafetensorsHeader(path), CODE, /cannot be opened/);
  });
});

describe('a folder', () => {
  const shards = async (weightMap: unknown): Promise<string> => {
    const folder = await temporaryFolder();
    await writeSafetensors(join(folder, 'one.safetensors'), THREE.slice(0, 2));
    await writeSafetensors(join(folder, 'two.safetensors'), THREE.slice(2));
    const index = JSON.stringify({ metadata: {}, weight_map: weightMap });
    await writeFile(join(folder, 'model.safetensors.index.json'), index);
    return folder;
  };

  test('of shards gives the tensors of all', async () => {
    const folder = await shards({
      a: 'one.safetensors',
      b: 'one.safetensors',
      c: 'two.safetensors',
    });
    const store = await readTensorStore(folder);
    expect([...store.values()].map(({ name, file }) => [name, file])).toEqual([
      ['a', join(folder, 'one.safetensors')],
      ['b', join(folder, 'one.safetensors')],
      ['c', join(folder, 'two.safetensors')],
    ]);
  });

  test.each<[string, unknown, RegExp]>([
    [
      'leads out of the folder',
      { a: '../one.safetensors' },
      /expected a .safetensors file of this/,
    ],
    ['leads out by detour', { a: 'x/../../one.safetensors' }, /expected a .safetensors file/],
    ['is absolute', { a: '/etc/one.safetensors' }, /expected a .safetensors file of this/],
    ['uses backslashes', { a: '..\\one.safetensors' }, /expected a .safetensors file of this/],
    ['names another kind of file', { a: 'config.json' }, /expected a .safetensors file of this/],
    ['is not a string', { a: 7 }, /not a file name/],
    ['names a missing shard', { a: 'three.safetensors' }, /three.safetensors, which is not in/],
    ['puts a tensor in the wrong shard', { c: 'one.safetensors' }, /one.safetensors holds .* c/],
    ['is a list', ['one.safetensors'], /no "weight_map" object/],
  ])('whose index %s is refused', async (_, weightMap, message) => {
    const folder = await shards(weightMap);
    await expectError(() => readTensorStore(folder), CODE, message);
  });

  test('without weights is refused with the remedy', async () => {
    const folder = await temporaryFolder();
    await mkdir(join(folder, 'model.safetensors'));
    await expectError(() => readTensorStore(folder), CODE, /must be saved as safetensors/);
  });
});
