// The safetensors container, read strictly and headers only: where each tensor lies in its file.
// Knows nothing of models. Every check here protects native code, which maps these byte ranges.

import { open, stat } from 'node:fs/promises';
import { basename, isAbsolute, join, normalize } from 'node:path';
import { TurbomindError } from '../errors.js';
import { hasDuplicateKeys, isJsonObject, type JsonObject, readJsonFile } from './json.js';

/** The format's own limit on a header. */
const MAX_HEADER_BYTES = 100_000_000;

/** Bits an element, for every dtype that the format names. */
const DTYPE_BITS: ReadonlyMap<string, number> = new Map([
  ['BOOL', 8],
  ['F4', 4],
  ['F6_E2M3', 6],
  ['F6_E3M2', 6],
  ['U8', 8],
  ['I8', 8],
  ['F8_E5M2', 8],
  ['F8_E4M3', 8],
  ['F8_E8M0', 8],
  ['F8_E4M3FNUZ', 8],
  ['F8_E5M2FNUZ', 8],
  ['I16', 16],
  ['U16', 16],
  ['F16', 16],
  ['BF16', 16],
  ['I32', 32],
  ['U32', 32],
  ['F32', 32],
  ['C64', 64],
  ['F64', 64],
  ['I64', 64],
  ['U64', 64],
]);

/** One tensor of a file. */
export interface StoredTensor {
  readonly name: string;
  /** As the file spells it: 'BF16', 'I32', … */
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Absolute path. */
  readonly file: string;
  /** Bytes from the start of the file. */
  readonly offset: number;
  readonly bytes: number;
}

/** All tensors of a model folder, by name. */
export type TensorStore = ReadonlyMap<string, StoredTensor>;

/**
 * Reads the headers of a folder's weights: `model.safetensors`, or the shards that
 * `model.safetensors.index.json` lists.
 *
 * @throws TurbomindError ERR_TM_INVALID_CHECKPOINT naming the file and what is wrong with it.
 */
export async function readTensorStore(folder: string): Promise<TensorStore> {
  const single = join(folder, 'model.safetensors');
  if (await isFile(single)) {
    return new Map((await readSafetensorsHeader(single)).map((tensor) => [tensor.name, tensor]));
  }
  const indexPath = join(folder, 'model.safetensors.index.json');
  if (await isFile(indexPath)) return readShards(folder, indexPath);
  throw invalid(
    folder,
    'has neither model.safetensors nor model.safetensors.index.json; weights in other formats ' +
      '(.bin, .gguf) must be saved as safetensors first',
  );
}

async function readShards(folder: string, indexPath: string): Promise<TensorStore> {
  const index = await readJsonFile(indexPath, 'ERR_TM_INVALID_CHECKPOINT');
  const weightMap = index.weight_map;
  if (!isJsonObject(weightMap)) throw invalid(indexPath, 'has no "weight_map" object');
  const shardOf = new Map<string, string>();
  for (const [tensor, shard] of Object.entries(weightMap)) {
    shardOf.set(tensor, shardName(indexPath, tensor, shard));
  }
  const tensorsOfShard = new Map<string, Map<string, StoredTensor>>();
  for (const shard of new Set(shardOf.values())) {
    const path = join(folder, shard);
    if (!(await isFile(path))) {
      throw invalid(indexPath, `names the shard ${shard}, which is not in the folder; download it`);
    }
    const tensors = await readSafetensorsHeader(path);
    tensorsOfShard.set(shard, new Map(tensors.map((tensor) => [tensor.name, tensor])));
  }
  const store = new Map<string, StoredTensor>();
  for (const [name, shard] of shardOf) {
    const tensor = tensorsOfShard.get(shard)?.get(name);
    if (tensor === undefined) {
      throw invalid(indexPath, `says that ${shard} holds the tensor ${name}, but it does not`);
    }
    store.set(name, tensor);
  }
  return store;
}

/** A shard is a file inside the folder: an index must not make us read anything else. */
function shardName(indexPath: string, tensor: string, value: unknown): string {
  if (typeof value !== 'string' || value === '') {
    throw invalid(indexPath, `maps ${tensor} to something that is not a file name`);
  }
  const isInside =
    !isAbsolute(value) &&
    !value.includes('\\') &&
    !value.includes('\0') &&
    !value.split('/').includes('..') &&
    normalize(value) === value;
  if (!isInside || !value.endsWith('.safetensors')) {
    throw invalid(
      indexPath,
      `maps ${tensor} to ${JSON.stringify(value)}; expected a .safetensors file of this folder`,
    );
  }
  return value;
}

/**
 * Reads and checks one file's header. Tensors come in the order of their bytes.
 *
 * @throws TurbomindError ERR_TM_INVALID_CHECKPOINT.
 */
export async function readSafetensorsHeader(path: string): Promise<StoredTensor[]> {
  const handle = await open(path, 'r').catch((cause: unknown) => {
    throw invalid(path, 'cannot be opened', cause);
  });
  try {
    const { size } = await handle.stat();
    if (size < 8) throw invalid(path, `is ${size} bytes long; a header needs at least 8`);
    const prefix = await readExactly(handle, path, 0, 8);
    const headerBytes = prefix.readBigUInt64LE(0);
    if (headerBytes > BigInt(MAX_HEADER_BYTES)) {
      throw invalid(
        path,
        `announces a header of ${headerBytes} bytes; the limit is ${MAX_HEADER_BYTES}, so this ` +
          'is probably not a safetensors file',
      );
    }
    const length = Number(headerBytes);
    if (8 + length > size) {
      throw invalid(
        path,
        `is truncated: the header ends at byte ${8 + length}, the file at ${size}`,
      );
    }
    const header = await readExactly(handle, path, 8, length);
    return parseHeader(header, path, size);
  } finally {
    await handle.close();
  }
}

interface PositionalReader {
  read(
    buffer: Buffer,
    offset: number,
    length: number,
    position: number,
  ): Promise<{ bytesRead: number }>;
}

async function readExactly(
  handle: PositionalReader,
  path: string,
  position: number,
  length: number,
): Promise<Buffer> {
  const buffer = Buffer.alloc(length);
  let done = 0;
  while (done < length) {
    const { bytesRead } = await handle.read(buffer, done, length - done, position + done);
    if (bytesRead === 0) throw invalid(path, `ended at byte ${position + done} while being read`);
    done += bytesRead;
  }
  return buffer;
}

/**
 * Checks header bytes against the format: valid UTF-8 JSON, no duplicate names, and tensors that
 * cover the data section exactly, without holes or overlaps.
 *
 * @param fileBytes size of the whole file, header included.
 */
export function parseHeader(header: Uint8Array, path: string, fileBytes: number): StoredTensor[] {
  const text = decodeUtf8(header, path);
  if (!text.startsWith('{')) throw invalid(path, 'has a header that does not begin with "{"');
  const parsed = parseJson(text, path);
  if (hasDuplicateKeys(text)) throw invalid(path, 'has a header with a duplicate key');
  const dataStart = 8 + header.length;
  const tensors: StoredTensor[] = [];
  for (const [name, entry] of Object.entries(parsed)) {
    if (name === '__metadata__') checkMetadata(entry, path);
    else tensors.push(readEntry(name, entry, path, dataStart));
  }
  tensors.sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  checkCoverage(tensors, path, dataStart, fileBytes);
  return tensors;
}

function decodeUtf8(bytes: Uint8Array, path: string): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw invalid(path, 'has a header that is not UTF-8', cause);
  }
}

function parseJson(text: string, path: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw invalid(path, 'has a header that is not JSON', cause);
  }
  if (!isJsonObject(value)) throw invalid(path, 'has a header that is not a JSON object');
  return value;
}

function checkMetadata(value: unknown, path: string): void {
  const isStringMap =
    isJsonObject(value) && Object.values(value).every((item) => typeof item === 'string');
  if (!isStringMap) throw invalid(path, 'has a __metadata__ that is not a map of strings');
}

function readEntry(name: string, value: unknown, path: string, dataStart: number): StoredTensor {
  const where = `tensor ${JSON.stringify(name)}`;
  if (!isJsonObject(value)) throw invalid(path, `${where} is not an object`);
  const { dtype, shape, data_offsets: offsets } = value;
  const bits = typeof dtype === 'string' ? DTYPE_BITS.get(dtype) : undefined;
  if (typeof dtype !== 'string' || bits === undefined) {
    throw invalid(path, `${where} has the unknown dtype ${JSON.stringify(dtype)}`);
  }
  if (!isSizeList(shape)) throw invalid(path, `${where} has a shape that is not a list of sizes`);
  if (!isSizeList(offsets) || offsets.length !== 2) {
    throw invalid(path, `${where} has data_offsets that are not two byte positions`);
  }
  const [begin = 0, end = 0] = offsets;
  if (begin > end) throw invalid(path, `${where} begins at ${begin}, behind its end at ${end}`);
  const expected = storedBytes(shape, bits);
  if (expected !== end - begin) {
    throw invalid(
      path,
      `${where} of ${dtype} [${shape.join(', ')}] needs ${expected ?? 'too many'} bytes but its ` +
        `data_offsets span ${end - begin}`,
    );
  }
  return { name, dtype, shape, file: path, offset: dataStart + begin, bytes: end - begin };
}

function isSizeList(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((size) => Number.isSafeInteger(size) && size >= 0);
}

/** Bytes of a tensor; undefined when they are no safe integer. */
function storedBytes(shape: readonly number[], bits: number): number | undefined {
  let elements = 1;
  for (const size of shape) {
    elements *= size;
    if (!Number.isSafeInteger(elements)) return undefined;
  }
  const bytes = (elements * bits) / 8;
  return Number.isSafeInteger(bytes) ? bytes : undefined;
}

function checkCoverage(
  tensors: readonly StoredTensor[],
  path: string,
  dataStart: number,
  fileBytes: number,
): void {
  let position = dataStart;
  for (const { name, offset, bytes } of tensors) {
    if (offset < position) {
      throw invalid(path, `tensor ${JSON.stringify(name)} overlaps the one before it`);
    }
    if (offset > position) {
      throw invalid(
        path,
        `has a hole of ${offset - position} bytes before tensor ${JSON.stringify(name)}`,
      );
    }
    position = offset + bytes;
    if (position > fileBytes) {
      throw invalid(
        path,
        `is truncated: tensor ${JSON.stringify(name)} ends at byte ${position}, the file at ` +
          `${fileBytes}; download it again`,
      );
    }
  }
  if (position !== fileBytes) {
    throw invalid(path, `has ${fileBytes - position} bytes behind its last tensor`);
  }
}

async function isFile(path: string): Promise<boolean> {
  const found = await stat(path).catch(() => undefined);
  return found?.isFile() ?? false;
}

function invalid(path: string, problem: string, cause?: unknown): TurbomindError {
  return new TurbomindError(
    'ERR_TM_INVALID_CHECKPOINT',
    `invalid checkpoint: ${basename(path)} ${problem} (${path})`,
    cause === undefined ? undefined : { cause },
  );
}
