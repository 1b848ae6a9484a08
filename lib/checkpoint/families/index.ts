// The table of model families: the first whose architectures name the checkpoint's reads it.

import { TurbomindError } from '../../errors.js';
import type { ConfigReader } from '../config.js';
import { DECODER_FAMILIES } from './decoders.js';
import type { ModelFamily } from './family.js';
import { internvlChat } from './internvl-chat.js';
import { internvlHf } from './internvl-hf.js';
import { textFamily } from './text.js';

/** One row a family. */
export const MODEL_FAMILIES: readonly ModelFamily[] = [
  internvlHf,
  internvlChat,
  ...DECODER_FAMILIES.map(textFamily),
];

/** Every architecture that can be opened. */
export const SUPPORTED_ARCHITECTURES: readonly string[] = MODEL_FAMILIES.flatMap(
  (family) => family.architectures,
);

/**
 * The family of a checkpoint and the architecture that chose it.
 *
 * @throws TurbomindError ERR_TM_UNSUPPORTED_MODEL with the list of supported ones.
 */
export function findModelFamily(config: ConfigReader): {
  readonly family: ModelFamily;
  readonly architecture: string;
} {
  const [architecture] = config.strings('architectures');
  const family = MODEL_FAMILIES.find(
    (candidate) => architecture !== undefined && candidate.architectures.includes(architecture),
  );
  if (family === undefined || architecture === undefined) {
    throw new TurbomindError(
      'ERR_TM_UNSUPPORTED_MODEL',
      `${config.path('architectures')} is ${JSON.stringify(config.raw('architectures') ?? null)}; ` +
        `supported: ${SUPPORTED_ARCHITECTURES.join(', ')}`,
    );
  }
  return { family, architecture };
}
