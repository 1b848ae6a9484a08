// quantization_config → which 4-bit layout the linear layers use. Refuses, with what is
// supported, everything that native code cannot run.

import { TurbomindError } from '../errors.js';
import type { ModelSpec } from '../native-types.js';
import type { ConfigReader } from './config.js';

export type QuantSpec = ModelSpec['quant'];

const SUPPORTED =
  'AWQ in the "gemm" layout with 4 bits, group size 32, 64 or 128 and zero points; ' +
  'or no quantization (f32, f16, bf16)';

const GROUP_SIZES = [32, 64, 128];

/**
 * Reads `quantization_config` of the first config that has one.
 *
 * @throws TurbomindError ERR_TM_UNSUPPORTED_QUANTIZATION naming field and value.
 */
export function readQuantization(configs: readonly (ConfigReader | undefined)[]): QuantSpec {
  const owner = configs.find((config) => config?.has('quantization_config'));
  const quant = owner?.optionalObject('quantization_config');
  if (quant === undefined) return { method: 'none', groupSize: 0 };

  const method = quant.string('quant_method', 'unnamed').toLowerCase();
  if (method !== 'awq') throw unsupported(quant, 'quant_method', method);
  const version = quant.string('version', 'gemm').toLowerCase();
  if (version !== 'gemm') throw unsupported(quant, 'version', version);
  // AutoAWQ's own quant_config.json spells two fields differently.
  const bits = quant.raw('bits') ?? quant.raw('w_bit');
  if (bits !== 4) throw unsupported(quant, 'bits', bits);
  const groupSize = quant.raw('group_size') ?? quant.raw('q_group_size');
  if (typeof groupSize !== 'number' || !GROUP_SIZES.includes(groupSize)) {
    throw unsupported(quant, 'group_size', groupSize);
  }
  const zeroPoint = quant.raw('zero_point') ?? true;
  if (zeroPoint !== true) throw unsupported(quant, 'zero_point', zeroPoint);
  return { method: 'awq', groupSize };
}

function unsupported(quant: ConfigReader, key: string, value: unknown): TurbomindError {
  return new TurbomindError(
    'ERR_TM_UNSUPPORTED_QUANTIZATION',
    `${quant.path(key)} is ${JSON.stringify(value) ?? 'missing'}; supported: ${SUPPORTED}`,
  );
}
