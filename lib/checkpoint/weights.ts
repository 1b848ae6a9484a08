// Matches what a model needs (weight rules) with what its files hold (tensor store): every tensor
// must be there with the right shape and a dtype that native code reads.

import { TurbomindError } from '../errors.js';
import type { NativeDType, TensorEntry } from '../native-types.js';
import type { LinearRule, TensorRule, WeightRule } from './families/family.js';
import type { QuantSpec } from './quantization.js';
import type { StoredTensor, TensorStore } from './safetensors.js';

/** Weights a 32-bit word of AWQ's qweight and qzeros holds. */
const PACKED = 8;

/** Names in one error message; more would hide the point. */
const MAX_LISTED = 10;

const FLOATS: ReadonlyMap<string, NativeDType> = new Map<string, NativeDType>([
  ['F32', 'f32'],
  ['F16', 'f16'],
  ['BF16', 'bf16'],
]);

const WORDS: ReadonlyMap<string, NativeDType> = new Map<string, NativeDType>([['I32', 'i32']]);

export interface ResolvedWeights {
  /** Absolute paths; `TensorEntry.file` indexes them. */
  readonly files: readonly string[];
  readonly tensors: readonly TensorEntry[];
  /** Weights as the model counts them: a packed word is eight; scales and zeros are none. */
  readonly parameters: number;
  readonly bytesByDType: Readonly<Partial<Record<NativeDType, number>>>;
  /** Stored tensors that the model does not use. */
  readonly unusedTensors: number;
}

/**
 * Finds every tensor of `rules` in `store`.
 *
 * @throws TurbomindError ERR_TM_MISSING_TENSOR or ERR_TM_TENSOR_MISMATCH listing up to ten names,
 * ERR_TM_UNSUPPORTED_QUANTIZATION where the files are packed in a way the config does not say.
 */
export function resolveWeights(
  rules: readonly WeightRule[],
  store: TensorStore,
  quant: QuantSpec,
): ResolvedWeights {
  const resolver = new Resolver(store, quant);
  for (const rule of rules) {
    if (rule.type === 'tensor') resolver.addTensor(rule);
    else resolver.addLinear(rule);
  }
  return resolver.finish();
}

class Resolver {
  readonly #store: TensorStore;
  readonly #quant: QuantSpec;
  readonly #tensors: TensorEntry[] = [];
  readonly #fileIndex = new Map<string, number>();
  readonly #bytesByDType: Partial<Record<NativeDType, number>> = {};
  readonly #used = new Set<string>();
  readonly #missing: string[] = [];
  readonly #mismatched: string[] = [];
  #parameters = 0;

  constructor(store: TensorStore, quant: QuantSpec) {
    this.#store = store;
    this.#quant = quant;
  }

  addTensor(rule: TensorRule): void {
    this.#add(rule, FLOATS, 1);
  }

  addLinear(rule: LinearRule): void {
    const { name, source, n, k } = rule;
    if (this.#store.has(`${source}.qweight`)) {
      this.#addAwq(rule);
    } else {
      this.#add(plain(`${name}.weight`, `${source}.weight`, [n, k]), FLOATS, 1);
    }
    if (rule.hasBias) this.#add(plain(`${name}.bias`, `${source}.bias`, [n]), FLOATS, 1);
  }

  #addAwq({ name, source, n, k }: LinearRule): void {
    const { method, groupSize } = this.#quant;
    if (method !== 'awq') {
      throw unsupported(
        `${source}.qweight is packed, but config.json has no quantization_config; expected AWQ ` +
          'with one',
      );
    }
    if (k % groupSize !== 0 || n % PACKED !== 0) {
      throw unsupported(
        `${source} has ${k} inputs and ${n} outputs; AWQ needs inputs in whole groups of ` +
          `${groupSize} and outputs in eights`,
      );
    }
    const groups = k / groupSize;
    const part = (suffix: string, shape: number[]) =>
      plain(`${name}.${suffix}`, `${source}.${suffix}`, shape);
    this.#add(part('qweight', [k, n / PACKED]), WORDS, PACKED);
    this.#add(part('qzeros', [groups, n / PACKED]), WORDS, 0);
    this.#add(part('scales', [groups, n]), FLOATS, 0);
  }

  /** @param weightsPerElement for the parameter count. */
  #add(
    rule: TensorRule,
    dtypes: ReadonlyMap<string, NativeDType>,
    weightsPerElement: number,
  ): void {
    const stored = this.#store.get(rule.source);
    if (stored === undefined) {
      this.#missing.push(rule.source);
      return;
    }
    this.#used.add(rule.source);
    const storedShape =
      rule.rows === undefined ? rule.shape : [rule.rows.total, ...rule.shape.slice(1)];
    const dtype = dtypes.get(stored.dtype);
    if (dtype === undefined || !sameShape(stored.shape, storedShape)) {
      const expected = `${[...dtypes.keys()].join('/')} [${storedShape.join(', ')}]`;
      this.#mismatched.push(
        `${rule.source} is ${stored.dtype} [${stored.shape.join(', ')}], expected ${expected}`,
      );
      return;
    }
    const entry = this.#entry(rule, stored, dtype);
    this.#tensors.push(entry);
    this.#parameters += elements(rule.shape) * weightsPerElement;
    this.#bytesByDType[dtype] = (this.#bytesByDType[dtype] ?? 0) + entry.bytes;
  }

  #entry(rule: TensorRule, stored: StoredTensor, dtype: NativeDType): TensorEntry {
    const { name, shape, rows } = rule;
    const rowBytes = rows === undefined ? 0 : stored.bytes / rows.total;
    return {
      name,
      dtype,
      shape,
      file: this.#indexOf(stored.file),
      offset: stored.offset + (rows === undefined ? 0 : rows.first * rowBytes),
      bytes: rows === undefined ? stored.bytes : (shape[0] ?? 0) * rowBytes,
    };
  }

  #indexOf(file: string): number {
    const index = this.#fileIndex.get(file) ?? this.#fileIndex.size;
    this.#fileIndex.set(file, index);
    return index;
  }

  finish(): ResolvedWeights {
    if (this.#missing.length > 0) {
      throw new TurbomindError(
        'ERR_TM_MISSING_TENSOR',
        `the checkpoint lacks ${list(this.#missing)}; is a shard missing, or does config.json ` +
          'belong to another model?',
      );
    }
    if (this.#mismatched.length > 0) {
      throw new TurbomindError(
        'ERR_TM_TENSOR_MISMATCH',
        `tensors do not fit config.json: ${list(this.#mismatched)}`,
      );
    }
    return {
      files: [...this.#fileIndex.keys()],
      tensors: this.#tensors,
      parameters: this.#parameters,
      bytesByDType: this.#bytesByDType,
      unusedTensors: this.#store.size - this.#used.size,
    };
  }
}

function plain(name: string, source: string, shape: readonly number[]): TensorRule {
  return { type: 'tensor', name, source, shape };
}

function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((size, axis) => size === b[axis]);
}

function elements(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

function list(items: readonly string[]): string {
  const shown = items.slice(0, MAX_LISTED).join('; ');
  const rest = items.length - MAX_LISTED;
  return rest > 0 ? `${shown}; and ${rest} more` : shown;
}

function unsupported(message: string): TurbomindError {
  return new TurbomindError('ERR_TM_UNSUPPORTED_QUANTIZATION', message);
}
