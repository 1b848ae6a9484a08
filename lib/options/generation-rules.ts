// Which values each option of an answer may have, one by one. What options say together is
// resolve-generation.ts's. Pure functions.
import * as check from '../check.js';
import type { GenerationOptions, PromptOptions } from './generation-options.js';
import { TILING_RULES } from './tiling.js';

const MAX_SEED = 2n ** 64n - 1n;

const seed: check.Rule = (value) =>
  (typeof value === 'bigint' && value >= 0n && value <= MAX_SEED) ||
  (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0)
    ? undefined
    : 'an integer from 0 to 2 ** 64 - 1 (a bigint above 2 ** 53)';

const penalty = check.number('from -2 to 2', (value) => value >= -2 && value <= 2);

const MAX_BIASES = 2 ** 16;

const logitBias: check.Rule = (value) => {
  const expected = 'token ids with a bias from -100 to 100 each, as an object or a Map';
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return expected;
  const entries: readonly (readonly [unknown, unknown])[] = [
    ...(value instanceof Map ? value : Object.entries(value)),
  ];
  if (entries.length > MAX_BIASES) return `at most ${MAX_BIASES} token ids`;
  const isRight = ([id, bias]: readonly [unknown, unknown]): boolean =>
    /^\d{1,10}$/.test(String(id)) &&
    Number(id) <= check.MAX_INT32 &&
    typeof bias === 'number' &&
    bias >= -100 &&
    bias <= 100;
  const wrong = entries.find((entry) => !isRight(entry));
  return wrong === undefined
    ? undefined
    : `${expected}; ${String(wrong[0])} has ${String(wrong[1])}`;
};

export const PROMPT_RULES: check.Rules<PromptOptions> = {
  ...TILING_RULES,
  maxTiles: check.integer(1, 2 ** 16),
  signal: check.abortSignal,
};

export const GENERATION_RULES: check.Rules<GenerationOptions> = {
  maxNewTokens: check.either(
    check.integer(1, check.MAX_INT32),
    check.exactly(null, 'null to fill the session'),
  ),
  minNewTokens: check.integer(0, check.MAX_INT32),
  priority: check.integer(-100, 100),
  queueTimeoutMs: check.number('above 0', (value) => value > 0),
  doSample: check.boolean,
  temperature: check.number('from 0 to 2', (value) => value >= 0 && value <= 2),
  topK: check.integer(0, check.MAX_INT32),
  topP: check.number('above 0 and at most 1', (value) => value > 0 && value <= 1),
  minP: check.number('from 0 to below 1', (value) => value >= 0 && value < 1),
  repetitionPenalty: check.number('above 0 and at most 10', (value) => value > 0 && value <= 10),
  frequencyPenalty: penalty,
  presencePenalty: penalty,
  logitBias,
  randomSeed: seed,
  stopWords: check.listOf(check.text, 256),
  stopTokenIds: check.listOf(check.integer(0, check.MAX_INT32), 1024),
  badWords: check.listOf(check.text, 1024),
  responseFormat: () => undefined, // readResponseFormat's
  ignoreEos: check.boolean,
  skipSpecialTokens: check.boolean,
  logprobs: check.either(check.integer(0, 1024), check.boolean),
  topLogprobs: check.integer(0, 1024),
  n: check.integer(1, 128),
  outputLogits: check.oneOf('generation', 'all'),
  outputLastHiddenState: check.oneOf('generation', 'all'),
  logitsProcessor: check.either(check.callback, check.listOf(check.callback, 64)),
  ...PROMPT_RULES,
};
