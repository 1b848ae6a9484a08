// Typed, bounded access to config.json and its relatives. Every getter names the file and the
// field when a value is missing, of the wrong type or absurd.

import { TurbomindError } from '../errors.js';
import { isJsonObject, type JsonObject, jsonGet } from './json.js';

/** Inclusive limits of a number. */
export interface Bounds {
  readonly min: number;
  readonly max: number;
}

/** Limits of sizes: generous for any model to come, small enough that no product overflows. */
export const LIMITS: Readonly<Record<LimitName, Bounds>> = {
  hidden: { min: 1, max: 1 << 17 },
  intermediate: { min: 1, max: 1 << 20 },
  layers: { min: 1, max: 1024 },
  heads: { min: 1, max: 1024 },
  headDim: { min: 1, max: 1024 },
  vocab: { min: 1, max: 1 << 22 },
  tokenId: { min: 0, max: (1 << 22) - 1 },
  positions: { min: 1, max: 1 << 26 },
  pixels: { min: 1, max: 8192 },
  epsilon: { min: 0, max: 0.1 },
  theta: { min: 1, max: 1e12 },
  tiles: { min: 1, max: 1024 },
};

type LimitName =
  | 'hidden'
  | 'intermediate'
  | 'layers'
  | 'heads'
  | 'headDim'
  | 'vocab'
  | 'tokenId'
  | 'positions'
  | 'pixels'
  | 'epsilon'
  | 'theta'
  | 'tiles';

/**
 * One JSON object of a config file, with its place for messages.
 *
 * @example
 * const config = new ConfigReader(json, 'config.json');
 * const hidden = config.object('text_config').integer('hidden_size', LIMITS.hidden);
 */
export class ConfigReader {
  readonly #json: JsonObject;
  readonly #where: string;

  constructor(json: JsonObject, where: string) {
    this.#json = json;
    this.#where = where;
  }

  /** `config.json: text_config.hidden_size`, for messages. */
  path(key: string): string {
    return this.#where.endsWith('.json') ? `${this.#where}: ${key}` : `${this.#where}.${key}`;
  }

  /** A field, with null taken as absent. */
  raw(key: string): unknown {
    return jsonGet(this.#json, key) ?? undefined;
  }

  has(key: string): boolean {
    return this.raw(key) !== undefined;
  }

  object(key: string): ConfigReader {
    const value = this.optionalObject(key);
    if (value === undefined) throw this.#missing(key);
    return value;
  }

  optionalObject(key: string): ConfigReader | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (!isJsonObject(value)) throw this.#wrong(key, value, 'an object');
    return new ConfigReader(value, this.path(key));
  }

  integer(key: string, bounds: Bounds): number {
    const value = this.optionalInteger(key, bounds);
    if (value === undefined) throw this.#missing(key);
    return value;
  }

  optionalInteger(key: string, bounds: Bounds): number | undefined {
    const value = this.optionalNumber(key, bounds);
    if (value !== undefined && !Number.isInteger(value)) {
      throw this.#wrong(key, value, 'a whole number');
    }
    return value;
  }

  number(key: string, bounds: Bounds): number {
    const value = this.optionalNumber(key, bounds);
    if (value === undefined) throw this.#missing(key);
    return value;
  }

  optionalNumber(key: string, bounds: Bounds): number | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (typeof value !== 'number') throw this.#wrong(key, value, 'a number');
    if (!(value >= bounds.min && value <= bounds.max)) {
      throw this.#wrong(key, value, `a number from ${bounds.min} to ${bounds.max}`);
    }
    return value;
  }

  boolean(key: string, fallback: boolean): boolean {
    return this.optionalBoolean(key) ?? fallback;
  }

  optionalBoolean(key: string): boolean | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (typeof value !== 'boolean') throw this.#wrong(key, value, 'true or false');
    return value;
  }

  string(key: string, fallback: string): string {
    return this.optionalString(key) ?? fallback;
  }

  optionalString(key: string): string | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (typeof value !== 'string') throw this.#wrong(key, value, 'a string');
    return value;
  }

  /** A list of strings; [] when absent. */
  strings(key: string): string[] {
    const value = this.raw(key) ?? [];
    if (!Array.isArray(value) || !value.every((item) => typeof item === 'string')) {
      throw this.#wrong(key, value, 'a list of strings');
    }
    return value;
  }

  /** A side length written as 448 or as [448, 448]. */
  squareSide(key: string, bounds: Bounds): number {
    const value = this.raw(key);
    if (!Array.isArray(value)) return this.integer(key, bounds);
    const [height, width] = value;
    if (value.length !== 2 || height !== width) throw this.#wrong(key, value, 'a square size');
    return new ConfigReader({ side: height }, this.path(key)).integer('side', bounds);
  }

  /** Refuses any value of a field but the listed ones; an absent field passes. */
  requireOneOf(key: string, supported: readonly (string | number | boolean)[]): void {
    const value = this.raw(key);
    if (value !== undefined && !supported.some((known) => known === value)) {
      throw this.unsupported(
        key,
        value,
        supported.map((known) => JSON.stringify(known)).join(', '),
      );
    }
  }

  /** The error for a valid config that asks for something we do not have. */
  unsupported(key: string, value: unknown, supported: string): TurbomindError {
    return new TurbomindError(
      'ERR_TM_UNSUPPORTED_MODEL',
      `${this.path(key)} is ${show(value)}; supported: ${supported}`,
    );
  }

  /** The error for a config that contradicts itself or is absurd. */
  invalid(key: string, value: unknown, expected: string): TurbomindError {
    return this.#wrong(key, value, expected);
  }

  #missing(key: string): TurbomindError {
    return new TurbomindError('ERR_TM_INVALID_CONFIG', `${this.path(key)} is missing`);
  }

  #wrong(key: string, value: unknown, expected: string): TurbomindError {
    return new TurbomindError(
      'ERR_TM_INVALID_CONFIG',
      `${this.path(key)} is ${show(value)}; expected ${expected}`,
    );
  }
}

/** A value as a message shows it: JSON, cut to a line. */
export function show(value: unknown): string {
  const text = JSON.stringify(value) ?? 'absent';
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}
