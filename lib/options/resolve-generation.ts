// GenerationOptions → ResolvedGenerationOptions: every value checked, settings that could change
// nothing refused, defaults filled in, LMDeploy's. Draws the seed where none is given; else pure
// functions.
import { randomBytes } from 'node:crypto';
import * as check from '../check.js';
import { TurbomindError } from '../errors.js';
import { type GrammarSource, readResponseFormat } from '../structured/response-format.js';
import type {
  GenerationOptions,
  LogitBias,
  PromptOptions,
  ResolvedGenerationOptions,
} from './generation-options.js';
import { GENERATION_RULES, PROMPT_RULES } from './generation-rules.js';
import { resolveTiling } from './tiling.js';

/** @throws TurbomindError ERR_TM_INVALID_OPTION */
export function resolveGenerationOptions(
  options: GenerationOptions = {},
): ResolvedGenerationOptions {
  check.checkOptions<GenerationOptions>('generation options', options, GENERATION_RULES);
  const sampled = options.doSample === true && options.temperature !== 0;
  checkGreedy(options);
  const grammar = resolveGrammar(options);
  const maxNewTokens = options.maxNewTokens === undefined ? 512 : options.maxNewTokens;
  const minNewTokens = options.minNewTokens ?? 0;
  if (maxNewTokens !== null && minNewTokens > maxNewTokens) {
    throw check.invalidOption(
      'minNewTokens',
      minNewTokens,
      `at most maxNewTokens (${maxNewTokens})`,
    );
  }
  return {
    maxNewTokens,
    minNewTokens,
    priority: options.priority ?? 0,
    queueTimeoutMs: options.queueTimeoutMs ?? 0,
    doSample: sampled,
    temperature: sampled ? (options.temperature ?? 0.8) : 1,
    topK: options.topK ?? 50,
    topP: options.topP ?? 1,
    minP: options.minP ?? 0,
    repetitionPenalty: options.repetitionPenalty ?? 1,
    frequencyPenalty: options.frequencyPenalty ?? 0,
    presencePenalty: options.presencePenalty ?? 0,
    logitBias: resolveBias(options.logitBias),
    seed: sampled ? resolveSeed(options.randomSeed) : 0n,
    stopWords: options.stopWords ?? [],
    stopTokenIds: options.stopTokenIds ?? [],
    badWords: options.badWords ?? [],
    grammar,
    ignoreEos: options.ignoreEos ?? false,
    skipSpecialTokens: options.skipSpecialTokens ?? true,
    ...resolveLogprobs(options),
    n: resolveChoices(options.n ?? 1, sampled),
    outputLogits: options.outputLogits ?? 'none',
    outputLastHiddenState: options.outputLastHiddenState ?? 'none',
    logitsProcessors: [options.logitsProcessor ?? []].flat(),
    tiling: resolveTiling(options),
    tileBudget: options.maxTiles,
    signal: options.signal,
  };
}

/**
 * Refuses what would change nothing where no token is drawn.
 * @throws TurbomindError ERR_TM_INVALID_OPTION
 */
export function resolvePromptOptions(options: PromptOptions = {}): ResolvedGenerationOptions {
  check.checkOptions<PromptOptions>('prompt options', options, PROMPT_RULES);
  return resolveGenerationOptions(options);
}

const SAMPLING_ONLY = ['temperature', 'topK', 'topP', 'minP', 'randomSeed'] as const;

// A setting that could change nothing is a mistake of the caller's, and is said so. Temperature 0
// is the usual way to ask for greedy decoding, so it is none.
function checkGreedy(options: GenerationOptions): void {
  if (options.doSample === true) return;
  const useless = SAMPLING_ONLY.find(
    (key) => options[key] !== undefined && !(key === 'temperature' && options[key] === 0),
  );
  if (useless === undefined) return;
  throw new TurbomindError(
    'ERR_TM_INVALID_OPTION',
    `${useless}: has no effect without sampling; add doSample: true, or leave ${useless} out`,
  );
}

function resolveGrammar(options: GenerationOptions): GrammarSource | undefined {
  const { responseFormat, minNewTokens = 0, ignoreEos = false, stopTokenIds = [] } = options;
  if (responseFormat === undefined) return undefined;
  const grammar = readResponseFormat(responseFormat);
  if (grammar === undefined) return undefined;
  if (minNewTokens > 0) {
    const message = 'minNewTokens: a responseFormat decides where an answer may end; leave it out';
    throw new TurbomindError('ERR_TM_INVALID_OPTION', message);
  }
  if (ignoreEos && stopTokenIds.length === 0) {
    const message = 'ignoreEos: an answer with a responseFormat needs a token to end with';
    throw new TurbomindError('ERR_TM_INVALID_OPTION', `${message}; add stopTokenIds`);
  }
  return grammar;
}

function resolveLogprobs({
  logprobs,
  topLogprobs,
}: GenerationOptions): Pick<ResolvedGenerationOptions, 'numLogprobs' | 'numTopLogprobs'> {
  if (topLogprobs === undefined) {
    const count = Number(logprobs ?? 0);
    return { numLogprobs: count, numTopLogprobs: count };
  }
  const contradicts =
    typeof logprobs === 'number' ? logprobs !== topLogprobs : !logprobs && logprobs !== undefined;
  if (contradicts && !(logprobs === false && topLogprobs === 0)) {
    throw check.invalidOption('logprobs', logprobs, `true beside topLogprobs: ${topLogprobs}`);
  }
  const isWanted = logprobs === true || topLogprobs > 0;
  return { numLogprobs: isWanted ? Math.max(1, topLogprobs) : 0, numTopLogprobs: topLogprobs };
}

function resolveChoices(n: number, sampled: boolean): number {
  if (n === 1 || sampled) return n;
  const message = `n: ${n} greedy answers are all the same; add doSample: true, or leave n out`;
  throw new TurbomindError('ERR_TM_INVALID_OPTION', message);
}

// An entry of 0 changes nothing; without it a row keeps its fast path.
function resolveBias(bias: LogitBias = {}): ResolvedGenerationOptions['logitBias'] {
  const entries: Iterable<readonly [number | string, number]> =
    bias instanceof Map ? bias : Object.entries(bias);
  return Array.from(entries, ([id, value]) => [Number(id), value] as const).filter(
    ([, value]) => value !== 0,
  );
}

function resolveSeed(value: number | bigint | undefined): bigint {
  return value === undefined ? randomBytes(8).readBigUInt64LE() : BigInt(value);
}
