// Qwen2 and Qwen2.5: biases on q, k and v, none elsewhere.

import { readSharedDecoder } from './decoder.js';
import type { DecoderFamily } from './family.js';

export const qwen2: DecoderFamily = {
  architecture: 'Qwen2ForCausalLM',
  modelType: 'qwen2',
  readDecoder: (config) => readSharedDecoder(config, { qkvBias: true, qkNorm: false }),
};
