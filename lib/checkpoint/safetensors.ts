// A model folder's safetensors files, their headers only: where each tensor lies in which file. What a
// header may say is safetensors-header.ts's. Knows nothing of models.

import { open, stat } from 'node:fs/promises';
import { isAbsolute, join, normalize } from 'node:path';
import { isJsonObject, readJsonFile } from './json.js';
import { invalidFile, parseHeader, type StoredTensor } from './safetensors-header.js';

export { parseHeader, type StoredTensor } from './safetensors-header.js';

/** The format's own limit on a header. */
const MAX_HEADER_BYTES = 100_000_000;

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
  throw invalidFile(
    folder,
    'has neither model.safetensors nor model.safetensors.index.json; weights in other formats ' +
      '(.bin, .gguf) must be saved as safetensors first',
  );
}

async function readShards(folder: string, indexPath: string): Promise<TensorStore> {
  const index = await readJsonFile(indexPath, 'ERR_TM_INVALID_CHECKPOINT');
  const weightMap = index.weight_map;
  if (!isJsonObject(weightMap)) throw invalidFile(indexPath, 'has no "weight_map" object');
  const shardOf = new Map<string, string>();
  for (const [tensor, shard] of Object.entries(weightMap)) {
    shardOf.set(tensor, shardName(indexPath, tensor, shard));
  }
  const tensorsOfShard = new Map<string, Map<string, StoredTensor>>();
  for (const shard of new Set(shardOf.values())) {
    const path = join(folder, shard);
    if (!(await isFile(path))) {
      throw invalidFile(
        indexPath,
        `names the shard ${shard}, which is not in the folder; download it`,
      );
    }
    const tensors = await readSafetensorsHeader(path);
    tensorsOfShard.set(shard, new Map(tensors.map((tensor) => [tensor.name, tensor])));
  }
  const store = new Map<string, StoredTensor>();
  for (const [name, shard] of shardOf) {
    const tensor = tensorsOfShard.get(shard)?.get(name);
    if (tensor === undefined) {
      throw invalidFile(indexPath, `says that ${shard} holds the tensor ${name}, but it does not`);
    }
    store.set(name, tensor);
  }
  return store;
}

/** A shard is a file inside the folder: an index must not make us read anything else. */
function shardName(indexPath: string, tensor: string, value: unknown): string {
  if (typeof value !== 'string' || value === '') {
    throw invalidFile(indexPath, `maps ${tensor} to something that is not a file name`);
  }
  const isInside =
    !isAbsolute(value) &&
    !value.includes('\\') &&
    !value.includes('\0') &&
    !value.split('/').includes('..') &&
    normalize(value) === value;
  if (!isInside || !value.endsWith('.safetensors')) {
    throw invalidFile(
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
    throw invalidFile(path, 'cannot be opened', cause);
  });
  try {
    const { size } = await handle.stat();
    if (size < 8) throw invalidFile(path, `is ${size} bytes long; a header needs at least 8`);
    const prefix = await readExactly(handle, path, 0, 8);
    const headerBytes = prefix.readBigUInt64LE(0);
    if (headerBytes > BigInt(MAX_HEADER_BYTES)) {
      throw invalidFile(
        path,
        `announces a header of ${headerBytes} bytes; the limit is ${MAX_HEADER_BYTES}, so this ` +
          'is probably not a safetensors file',
      );
    }
    const length = Number(headerBytes);
    if (8 + length > size) {
      throw invalidFile(
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
    if (bytesRead === 0)
      throw invalidFile(path, `ended at byte ${position + done} while being read`);
    done += bytesRead;
  }
  return buffer;
}

async function isFile(path: string): Promise<boolean> {
  const found = await stat(path).catch(() => undefined);
  return found?.isFile() ?? false;
}
