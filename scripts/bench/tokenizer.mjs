// A byte-level BPE tokenizer of Qwen's size: the real one from a folder that holds tokenizer.json,
// or a synthetic one of 151,643 entries and three special ones, made on the spot.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Random } from './model-shape.mjs';
import { makeVocabulary } from './vocabulary.mjs';

const NUM_TOKENS = 151_643;
const SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'];

export function makeTokenizer(folder) {
  if (folder) {
    return {
      json: JSON.parse(readFileSync(join(folder, 'tokenizer.json'), 'utf8')),
      config: JSON.parse(readFileSync(join(folder, 'tokenizer_config.json'), 'utf8')),
    };
  }
  const { tokens, merges } = makeVocabulary(NUM_TOKENS, new Random(7));
  const vocab = Object.fromEntries(tokens.map((t, i) => [t, i]));
  const added = SPECIALS.map((content, i) => ({
    id: NUM_TOKENS + i,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  }));
  const split =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
  return {
    json: {
      version: '1.0',
      truncation: null,
      padding: null,
      added_tokens: added,
      normalizer: { type: 'NFC' },
      pre_tokenizer: {
        type: 'Sequence',
        pretokenizers: [
          { type: 'Split', pattern: { Regex: split }, behavior: 'Isolated', invert: false },
          { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: false },
        ],
      },
      post_processor: {
        type: 'ByteLevel',
        add_prefix_space: false,
        trim_offsets: false,
        use_regex: false,
      },
      decoder: {
        type: 'ByteLevel',
        add_prefix_space: false,
        trim_offsets: false,
        use_regex: false,
      },
      model: {
        type: 'BPE',
        dropout: null,
        unk_token: null,
        continuing_subword_prefix: '',
        end_of_word_suffix: '',
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: false,
        vocab,
        merges: merges.map((m) => m.join(' ')),
      },
    },
    config: {
      add_prefix_space: false,
      bos_token: null,
      eos_token: '<|endoftext|>',
      pad_token: '<|endoftext|>',
      clean_up_tokenization_spaces: false,
      model_max_length: 32_768,
      tokenizer_class: 'Qwen2Tokenizer',
      unk_token: null,
    },
  };
}
