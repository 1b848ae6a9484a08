// The decoder families, for use alone and inside vision-language models.

import { TurbomindError } from '../../errors.js';
import type { ConfigReader } from '../config.js';
import type { DecoderFamily } from './family.js';
import { llama } from './llama.js';
import { qwen2 } from './qwen2.js';
import { qwen3 } from './qwen3.js';

/** One row a decoder family. */
export const DECODER_FAMILIES: readonly DecoderFamily[] = [qwen2, qwen3, llama];

/**
 * The family of an inner config (`text_config`, `llm_config`), by `architectures` or `model_type`.
 *
 * @throws TurbomindError ERR_TM_UNSUPPORTED_MODEL with the list of supported ones.
 */
export function findDecoderFamily(config: ConfigReader): DecoderFamily {
  const [architecture] = config.strings('architectures');
  const modelType = config.optionalString('model_type');
  const family = DECODER_FAMILIES.find((candidate) =>
    architecture === undefined
      ? candidate.modelType === modelType
      : candidate.architecture === architecture,
  );
  if (family === undefined) {
    const key = architecture === undefined ? 'model_type' : 'architectures';
    throw new TurbomindError(
      'ERR_TM_UNSUPPORTED_MODEL',
      `${config.path(key)} is ${JSON.stringify(architecture ?? modelType ?? null)}; supported ` +
        `language models: ${DECODER_FAMILIES.map((known) => known.architecture).join(', ')}`,
    );
  }
  return family;
}
