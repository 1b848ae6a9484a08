// A language model on its own: config.json is the decoder's config. Base models saved without
// their head's wrapper lack the `model.` prefix.

import { decoderWeights, readTiedEmbeddings } from './decoder.js';
import { type DecoderFamily, findPrefix, type ModelFamily } from './family.js';

/** Makes a model family of a decoder family. */
export function textFamily(decoderFamily: DecoderFamily): ModelFamily {
  return {
    architectures: [decoderFamily.architecture],
    read: (input) => {
      const { config } = input;
      const prefix = findPrefix(input, ['model.', ''], 'embed_tokens.weight');
      const decoder = {
        ...decoderFamily.readDecoder(config),
        tiedEmbeddings: readTiedEmbeddings(input, [config], 'lm_head'),
      };
      return { decoder, weights: decoderWeights(decoder, prefix, 'lm_head'), configs: [config] };
    },
  };
}
