// generation_config.json: what the model's authors recommend. Only its end-of-sequence ids are used in
// answers (lib/options.ts says why); the rest is read and checked, for whoever wants to look it up.
import { ConfigReader, LIMITS } from './config.js';
import type { JsonObject } from './json.js';

/** generation_config.json: what the model's authors recommend. Absent fields were not given. */
export interface GenerationDefaults {
  readonly eosTokenIds: readonly number[];
  readonly doSample?: boolean;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly repetitionPenalty?: number;
  readonly maxNewTokens?: number;
}

/** @param configs the model's configs, outermost first: some name the eos token only there. */
export function readGeneration(
  json: JsonObject | undefined,
  configs: readonly ConfigReader[],
): GenerationDefaults {
  const reader = new ConfigReader(json ?? {}, 'generation_config.json');
  const own = readTokenIds(reader, 'eos_token_id');
  // The innermost config is the language model's.
  const inherited = [...configs].reverse().map((config) => readTokenIds(config, 'eos_token_id'));
  const optional = {
    doSample: reader.optionalBoolean('do_sample'),
    temperature: reader.optionalNumber('temperature', { min: 0, max: 100 }),
    topK: reader.optionalInteger('top_k', { min: 0, max: LIMITS.vocab.max }),
    topP: reader.optionalNumber('top_p', { min: 0, max: 1 }),
    minP: reader.optionalNumber('min_p', { min: 0, max: 1 }),
    repetitionPenalty: reader.optionalNumber('repetition_penalty', { min: 0.01, max: 100 }),
    maxNewTokens: reader.optionalInteger('max_new_tokens', LIMITS.positions),
  };
  return {
    eosTokenIds: [own, ...inherited].find((ids) => ids.length > 0) ?? [],
    ...dropUndefined(optional),
  };
}

/** A token id or a list of them; [] when absent. */
function readTokenIds(config: ConfigReader, key: string): number[] {
  const value = config.raw(key) ?? [];
  const ids: unknown[] = Array.isArray(value) ? value : [value];
  const isId = (id: unknown): id is number =>
    typeof id === 'number' && Number.isInteger(id) && id >= 0 && id < LIMITS.vocab.max;
  if (!ids.every(isId)) throw config.invalid(key, value, 'a token id or a list of token ids');
  return [...new Set(ids)];
}

type Defined<T> = { [K in keyof T]?: Exclude<T[K], undefined> };

function dropUndefined<T extends Record<string, unknown>>(fields: T): Defined<T>;
function dropUndefined(fields: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}
