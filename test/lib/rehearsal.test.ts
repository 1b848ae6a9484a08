// What opening a pipeline does before the first call: it goes the whole way of a call, leaves nothing
// behind, and what a model refuses of it is the caller's to meet, not opening's.
import { beforeAll, describe, expect, test, vi } from 'vitest';
import { PromptBuilder } from '../../lib/chat.js';
import { type Checkpoint, openCheckpoint } from '../../lib/checkpoint/checkpoint.js';
import { embeddedModel } from '../../lib/embedded-model.js';
import type { NativeAddon } from '../../lib/native-types.js';
import { openPipeline } from '../../lib/open-pipeline.js';
import { resolvePipelineOptions } from '../../lib/options.js';
import { type RehearsalParts, rehearse } from '../../lib/rehearsal.js';
import { loadTokenizer, type Tokenizer } from '../../lib/tokenizer.js';
import { makeFakeAddon } from './support/fake-addon.js';

// Every template that is compiled.
const compiled: string[] = vi.hoisted(() => []);
vi.mock('@huggingface/jinja', async (importOriginal) => {
  const original = await importOriginal<typeof import('@huggingface/jinja')>();
  class Template extends original.Template {
    constructor(source: string) {
      super(source);
      compiled.push(source);
    }
  }
  return { ...original, Template };
});

const EOS = 258;
const REFUSING = "{{ raise_exception('words only on Sundays') }}";
let checkpoint: Checkpoint;
let tokenizer: Tokenizer;
beforeAll(async () => {
  checkpoint = await openCheckpoint(embeddedModel());
  tokenizer = await loadTokenizer(checkpoint);
});

function partsOf(addon: NativeAddon, given: Checkpoint): RehearsalParts {
  const promptBuilder = new PromptBuilder(given, tokenizer);
  return { addon, checkpoint: given, tokenizer, promptBuilder, options: resolvePipelineOptions() };
}
const fakeAddon = () => makeFakeAddon({ answer: () => [...tokenizer.encode('abc'), EOS] });

describe('a rehearsal', () => {
  test('encodes prompts and decodes answers, more than once', async () => {
    const addon = fakeAddon();
    const encode = vi.spyOn(tokenizer, 'encode');
    const decode = vi.spyOn(tokenizer, 'bytesOf');
    try {
      await rehearse(partsOf(addon, checkpoint));
      expect(encode.mock.calls.length).toBeGreaterThan(1);
      expect(decode.mock.calls.length).toBeGreaterThan(1);
    } finally {
      encode.mockRestore();
      decode.mockRestore();
    }
    expect(addon.engines).toEqual([]);
  });

  test('is over, and of no account, when a pipeline is open', async () => {
    const addon = fakeAddon();
    const pipe = await openPipeline(embeddedModel(), { device: 'cpu' }, addon);
    expect(addon.engines.map((engine) => engine.submitted)).toEqual([[]]);
    const { requests, tokens } = pipe.metrics();
    expect(requests).toMatchObject({ submitted: 0, errors: {}, running: 0, waiting: 0 });
    expect(tokens).toEqual({ prompt: 0, completion: 0, cached: 0 });
    expect((await pipe('hello')).text).toBe('abc');
    expect(pipe.metrics().requests.submitted).toBe(1);
    await pipe.close();
  });

  test('and the pipeline after it share one template, compiled once', async () => {
    compiled.length = 0;
    const pipe = await openPipeline(embeddedModel(), { device: 'cpu' }, fakeAddon());
    await pipe('hello');
    expect(compiled).toHaveLength(1);
    await pipe.close();
  });

  test('that the template refuses does not keep a pipeline from opening', async () => {
    const options = { device: 'cpu', chatTemplate: REFUSING } as const;
    const pipe = await openPipeline(embeddedModel(), options, fakeAddon());
    await expect(pipe('hello')).rejects.toMatchObject({
      message: expect.stringContaining('words only on Sundays'),
    });
    await pipe.close();
  });

  test('of a context shorter than its prompt does not, either', async () => {
    const short = { ...checkpoint.spec.decoder, maxPositionEmbeddings: 16 };
    const given = { ...checkpoint, spec: { ...checkpoint.spec, decoder: short } };
    await expect(rehearse(partsOf(fakeAddon(), given))).resolves.toBeUndefined();
  });
});
