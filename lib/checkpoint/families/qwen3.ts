// Qwen3 (dense): no biases, an RMSNorm per head on q and k before RoPE, head_dim of its own.

import { readSharedDecoder } from './decoder.js';
import type { DecoderFamily } from './family.js';

export const qwen3: DecoderFamily = {
  architecture: 'Qwen3ForCausalLM',
  modelType: 'qwen3',
  readDecoder: (config) => readSharedDecoder(config, { qkvBias: false, qkNorm: true }),
};
