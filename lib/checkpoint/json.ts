// JSON files of a model folder: read, bounded, checked to be objects. Values stay `unknown` until
// config.ts has looked at them.

import { readFile, stat } from 'node:fs/promises';
import { basename } from 'node:path';
import { TurbomindError, type TurbomindErrorCode } from '../errors.js';

/** An object as JSON.parse makes it. Look keys up with `jsonGet`, which ignores the prototype. */
export type JsonObject = Readonly<Record<string, unknown>>;

/** Far above any real config, index or tokenizer, far below what would exhaust memory. */
const MAX_JSON_BYTES = 256 * 1024 * 1024;

export function isJsonObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** An own property, or undefined: `constructor` and its like are not config fields. */
export function jsonGet(object: JsonObject, key: string): unknown {
  return Object.hasOwn(object, key) ? object[key] : undefined;
}

/** Reads a file that must exist. A byte order mark is skipped. */
export async function readJsonFile(path: string, code: TurbomindErrorCode): Promise<JsonObject> {
  const value = await readOptionalJsonFile(path, code);
  if (value === undefined) {
    throw new TurbomindError(code, `${basename(path)} is missing (${path})`);
  }
  return value;
}

/** Reads a file if it exists. */
export async function readOptionalJsonFile(
  path: string,
  code: TurbomindErrorCode,
): Promise<JsonObject | undefined> {
  const text = await readOptionalTextFile(path, code);
  return text === undefined ? undefined : parseJsonObject(text, path, code);
}

/** Reads a text file if it exists, without its byte order mark. */
export async function readOptionalTextFile(
  path: string,
  code: TurbomindErrorCode,
): Promise<string | undefined> {
  try {
    const { size } = await stat(path);
    if (size > MAX_JSON_BYTES) {
      const most = `the limit is ${MAX_JSON_BYTES}`;
      throw new TurbomindError(code, `${basename(path)} is ${size} bytes long; ${most} (${path})`);
    }
    const text = await readFile(path, 'utf8');
    return text.startsWith('\uFEFF') ? text.slice(1) : text;
  } catch (cause) {
    if (cause instanceof TurbomindError) throw cause;
    if (isNotFound(cause)) return undefined;
    throw new TurbomindError(code, `${basename(path)} cannot be read (${path})`, { cause });
  }
}

function parseJsonObject(text: string, path: string, code: TurbomindErrorCode): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    const message = `${basename(path)} is not valid JSON; download it again (${path})`;
    throw new TurbomindError(code, message, { cause });
  }
  if (!isJsonObject(value)) {
    throw new TurbomindError(code, `${basename(path)} does not hold a JSON object (${path})`);
  }
  return value;
}

function isNotFound(error: unknown): boolean {
  return error instanceof Error && 'code' in error && error.code === 'ENOENT';
}

/**
 * True when some object of a valid JSON text names a key twice. JSON.parse keeps the last one, so
 * two readers of such a file may see two different models.
 */
export function hasDuplicateKeys(text: string): boolean {
  // One set of keys an open object; arrays push undefined to keep the depth.
  const scopes: (Set<string> | undefined)[] = [];
  let position = 0;
  while (position < text.length) {
    switch (text.charCodeAt(position)) {
      case OPEN_BRACE:
        scopes.push(new Set());
        break;
      case OPEN_BRACKET:
        scopes.push(undefined);
        break;
      case CLOSE_BRACE:
      case CLOSE_BRACKET:
        scopes.pop();
        break;
      case QUOTE: {
        const end = stringEnd(text, position);
        const keys = scopes.at(-1);
        if (keys !== undefined && isKey(text, end)) {
          const key: unknown = JSON.parse(text.slice(position, end));
          if (typeof key === 'string' && keys.has(key)) return true;
          if (typeof key === 'string') keys.add(key);
        }
        position = end;
        continue;
      }
    }
    position += 1;
  }
  return false;
}

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const COLON = 0x3a;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;

/** Position behind the closing quote of the string that opens at `start`. */
function stringEnd(text: string, start: number): number {
  let position = start + 1;
  while (position < text.length && text.charCodeAt(position) !== QUOTE) {
    position += text.charCodeAt(position) === BACKSLASH ? 2 : 1;
  }
  return position + 1;
}

/** In valid JSON a string is a key exactly if a colon follows. */
function isKey(text: string, end: number): boolean {
  let position = end;
  while (' \t\r\n'.includes(text.charAt(position)) && position < text.length) position += 1;
  return text.charCodeAt(position) === COLON;
}
