// A safetensors header, read strictly. Knows nothing of models or files. Every check here protects native
// code, which maps these byte ranges. Pure functions.
import { basename } from 'node:path';
import { TurbomindError } from '../errors.js';
import { hasDuplicateKeys, isJsonObject, type JsonObject } from './json.js';

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

/**
 * Checks header bytes against the format: valid UTF-8 JSON, no duplicate names, and tensors that
 * cover the data section exactly, without holes or overlaps.
 *
 * @param fileBytes size of the whole file, header included.
 */
export function parseHeader(header: Uint8Array, path: string, fileBytes: number): StoredTensor[] {
  const text = decodeUtf8(header, path);
  if (!text.startsWith('{')) throw invalidFile(path, 'has a header that does not begin with "{"');
  const parsed = parseJson(text, path);
  if (hasDuplicateKeys(text)) throw invalidFile(path, 'has a header with a duplicate key');
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
    throw invalidFile(path, 'has a header that is not UTF-8', cause);
  }
}

function parseJson(text: string, path: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw invalidFile(path, 'has a header that is not JSON', cause);
  }
  if (!isJsonObject(value)) throw invalidFile(path, 'has a header that is not a JSON object');
  return value;
}

function checkMetadata(value: unknown, path: string): void {
  const isStringMap =
    isJsonObject(value) && Object.values(value).every((item) => typeof item === 'string');
  if (!isStringMap) throw invalidFile(path, 'has a __metadata__ that is not a map of strings');
}

function readEntry(name: string, value: unknown, path: string, dataStart: number): StoredTensor {
  const where = `tensor ${JSON.stringify(name)}`;
  if (!isJsonObject(value)) throw invalidFile(path, `${where} is not an object`);
  const { dtype, shape, data_offsets: offsets } = value;
  const bits = typeof dtype === 'string' ? DTYPE_BITS.get(dtype) : undefined;
  if (typeof dtype !== 'string' || bits === undefined) {
    throw invalidFile(path, `${where} has the unknown dtype ${JSON.stringify(dtype)}`);
  }
  if (!isSizeList(shape))
    throw invalidFile(path, `${where} has a shape that is not a list of sizes`);
  if (!isSizeList(offsets) || offsets.length !== 2) {
    throw invalidFile(path, `${where} has data_offsets that are not two byte positions`);
  }
  const [begin = 0, end = 0] = offsets;
  if (begin > end) throw invalidFile(path, `${where} begins at ${begin}, behind its end at ${end}`);
  const expected = storedBytes(shape, bits);
  if (expected !== end - begin) {
    throw invalidFile(
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
      throw invalidFile(path, `tensor ${JSON.stringify(name)} overlaps the one before it`);
    }
    if (offset > position) {
      throw invalidFile(
        path,
        `has a hole of ${offset - position} bytes before tensor ${JSON.stringify(name)}`,
      );
    }
    position = offset + bytes;
    if (position > fileBytes) {
      throw invalidFile(
        path,
        `is truncated: tensor ${JSON.stringify(name)} ends at byte ${position}, the file at ` +
          `${fileBytes}; download it again`,
      );
    }
  }
  if (position !== fileBytes) {
    throw invalidFile(path, `has ${fileBytes - position} bytes behind its last tensor`);
  }
}

/** What is wrong with a file of a checkpoint. */
export function invalidFile(path: string, problem: string, cause?: unknown): TurbomindError {
  return new TurbomindError(
    'ERR_TM_INVALID_CHECKPOINT',
    `invalid checkpoint: ${basename(path)} ${problem} (${path})`,
    cause === undefined ? undefined : { cause },
  );
}
