// A tokenizer's vocabulary as the matcher wants it: bytes. Runs on the JS thread, in slices.
import type { Tokenizer } from '../tokenizer.js';
import { Turns } from '../turns.js';
import type { Vocabulary } from './protocol.js';

const SLICE_MS = 4;

/**
 * Bytes of all tokens a grammar may draw: not special ones, not those that end an answer. Reading
 * 150 thousand tokens takes 0.4 s, so the event loop gets its turns in between.
 */
export async function readVocabulary(tokenizer: Tokenizer, vocabSize: number): Promise<Vocabulary> {
  const stops = new Set(tokenizer.eosIds);
  const numTokens = Math.min(vocabSize, tokenizer.vocabSize);
  const offsets = new Uint32Array(vocabSize + 1);
  const tokens: Uint8Array[] = [];
  const turns = new Turns(SLICE_MS);
  let end = 0;
  for (let id = 0; id < numTokens; id += 1) {
    if (!stops.has(id) && !tokenizer.isSpecial(id)) {
      const token = tokenizer.bytesOf(id);
      tokens.push(token);
      end += token.length;
    }
    offsets[id + 1] = end;
    await turns.giveWay();
  }
  offsets.fill(end, numTokens + 1);
  return { bytes: Buffer.concat(tokens), offsets };
}
