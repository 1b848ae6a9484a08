// What types forbid and plain JavaScript does all the same: every wrong argument is a TurbomindError
// that says what is expected, and nobody's callback ends the process. Options and prompts have tests
// of their own.
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { embeddedModel } from '../../lib/embedded-model.js';
import { estimate } from '../../lib/estimate.js';
import { openPipeline } from '../../lib/open-pipeline.js';
import { type PipelineOptions, resolvePipelineOptions } from '../../lib/options.js';
import { Pipeline } from '../../lib/pipeline.js';
import { type FakeAddon, makeFakeAddon } from './support/fake-addon.js';

/** A value that its type does not allow. */
function lie<T>(value: unknown): T {
  return value as T;
}

// What a tokenizer must have, but for its size.
const NOTHING = () => undefined;
const TOKENIZER = {
  encode: NOTHING,
  idOf: NOTHING,
  bytesOf: NOTHING,
  textOf: NOTHING,
  isSpecial: NOTHING,
  prepare: NOTHING,
  eosIds: [],
  specialTokens: [],
  stripsLeadingSpace: false,
};

let pipe: Pipeline;
const open = async (
  options: PipelineOptions,
  addon: FakeAddon = makeFakeAddon({ answer: () => [65] }),
) => await openPipeline(embeddedModel(), { device: 'cpu', ...options }, addon);

beforeAll(async () => {
  pipe = await open({});
});
afterAll(() => pipe.close());

async function failure(run: () => unknown): Promise<{ code: unknown; message: string }> {
  try {
    await run();
  } catch (error) {
    if (error instanceof Error) return { code: Reflect.get(error, 'code'), message: error.message };
    throw error;
  }
  throw new Error('nothing was refused');
}

describe('wrong arguments', () => {
  test.each([
    ['decode of a number', () => pipe.decode(lie(5)), 'ERR_TM_INVALID_ARGUMENT', 'token id'],
    ['decode of NaN', () => pipe.decode([Number.NaN]), 'ERR_TM_INVALID_ARGUMENT', 'NaN'],
    [
      'decode with a misspelt option',
      () => pipe.decode([65], lie({ skipSpecialToken: false })),
      'ERR_TM_INVALID_OPTION',
      'did you mean skipSpecialTokens',
    ],
    ['decode of texts', () => pipe.decode(lie(['a'])), 'ERR_TM_INVALID_ARGUMENT', 'a is not'],
    [
      'promptIds of two',
      () => pipe.promptIds(lie(['a', 'b'])),
      'ERR_TM_INVALID_PROMPT',
      '2 prompts',
    ],
    ['promptLogits of none', () => pipe.promptLogits(lie([])), 'ERR_TM_INVALID_PROMPT', ''],
    [
      'a registry that is none',
      () => pipe.registerMetrics(lie({})),
      'ERR_TM_INVALID_OPTION',
      'prom-client',
    ],
    ['new Pipeline()', () => new Pipeline(lie(undefined)), 'ERR_TM_INVALID_ARGUMENT', 'pipeline()'],
    ['estimate of a number', () => estimate(lie(5)), 'ERR_TM_INVALID_OPTION', 'model folder'],
    [
      'estimate with null',
      () => estimate(undefined, lie(null)),
      'ERR_TM_INVALID_OPTION',
      'an object',
    ],
    [
      'options not awaited',
      () => resolvePipelineOptions(lie(Promise.resolve({}))),
      'ERR_TM_INVALID_OPTION',
      'an object (Promise)',
    ],
    [
      'a tokenizer that is none',
      () => resolvePipelineOptions({ tokenizer: lie({ encode: () => [], bytesOf: () => [] }) }),
      'ERR_TM_INVALID_OPTION',
      'idOf',
    ],
    [
      'a tokenizer without special tokens',
      () => resolvePipelineOptions({ tokenizer: lie({ ...TOKENIZER, specialTokens: undefined }) }),
      'ERR_TM_INVALID_OPTION',
      'a list specialTokens',
    ],
    [
      'a tokenizer without a size',
      () => resolvePipelineOptions({ tokenizer: lie(TOKENIZER) }),
      'ERR_TM_INVALID_OPTION',
      'with vocabSize',
    ],
  ] as const)('%s', async (_, run, code, text) => {
    const error = await failure(run);
    expect(error.code, error.message).toBe(code);
    expect(error.message).toContain(text);
  });

  test('after close even what needs no engine is refused', async () => {
    const other = await open({});
    await other.close();
    expect((await failure(() => other.promptIds('a'))).code).toBe('ERR_TM_DISPOSED');
  });
});

test('an aborted signal ends an estimate, and the wait for prompt logits', async () => {
  const reason = new Error('enough');
  const aborted = estimate(embeddedModel(), { device: 'cpu', signal: AbortSignal.abort(reason) });
  await expect(aborted).rejects.toBe(reason);

  const addon = makeFakeAddon({ answer: () => [65] });
  const other = await open({}, addon);
  const [engine] = addon.engines;
  if (engine === undefined) throw new Error('no engine was opened');
  const controller = new AbortController();
  engine.promptLogits = () => {
    queueMicrotask(() => controller.abort(reason));
    return new Promise(() => undefined);
  };
  const logits = other.promptLogits('a', { signal: controller.signal });
  await expect(logits).rejects.toBe(reason);
  await other.close();
});

test('a progress function that throws ends its load, and the engine is closed', async () => {
  const addon = makeFakeAddon({ answer: () => [65] });
  const options = {
    onProgress: () => {
      throw new Error('mine');
    },
  };
  await expect(open(options, addon)).rejects.toThrow('mine');
  expect(addon.engines.map(({ isClosed }) => isClosed)).toEqual([true]);
});
