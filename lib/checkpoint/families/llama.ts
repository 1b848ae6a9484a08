// Llama and the many models that use its block: no biases, no norms on q and k.

import { readSharedDecoder } from './decoder.js';
import type { DecoderFamily } from './family.js';

export const llama: DecoderFamily = {
  architecture: 'LlamaForCausalLM',
  modelType: 'llama',
  readDecoder: (config) => readSharedDecoder(config, { qkvBias: false, qkNorm: false }),
};
