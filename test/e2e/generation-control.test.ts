// Generation options on the real engine and the embedded model, each against its formula worked out
// by hand from the logits that outputLogits gives.
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { pipeline } from '../../lib/open-pipeline.js';
import type { Pipeline } from '../../lib/pipeline.js';
import type { FloatRows } from '../../lib/response.js';
import { embedded, fixture } from './support/paths.js';

const PROMPT = 'What is 37 + 45?';
let pipe: Pipeline;

beforeAll(async () => {
  pipe = await pipeline(embedded, { device: 'cpu' });
});
afterAll(() => pipe?.close());

function row(rows: FloatRows | undefined, index: number): Float32Array {
  if (rows === undefined) throw new Error('no rows');
  const columns = rows.shape[1];
  return rows.data.subarray(index * columns, (index + 1) * columns);
}

function argmax(values: ArrayLike<number>): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if ((values[i] ?? 0) > (values[best] ?? 0)) best = i;
  return best;
}

function logSoftmax(logits: Float32Array): number[] {
  const max = Math.max(...logits);
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - max), 0);
  return Array.from(logits, (logit) => logit - max - Math.log(sum));
}

describe('outputs', () => {
  test('the logits of a greedy answer choose its tokens, and start as the reference does', async () => {
    const golden: {
      readonly items: readonly {
        readonly images: readonly string[];
        readonly messages: readonly { readonly content: readonly { readonly text?: string }[] }[];
        readonly awq: {
          readonly output_ids: readonly number[];
          readonly first_top5: readonly { readonly id: number; readonly logit: number }[];
        };
      }[];
    } = JSON.parse(readFileSync(fixture('golden.json'), 'utf8'));
    const item = golden.items.find(
      ({ images, messages }) => images.length === 1 && messages.length === 1,
    );
    if (item === undefined) throw new Error('no case of one picture');
    const text = item.messages[0]?.content.map((part) => part.text ?? '').join('') ?? '';
    const prompt = { text, images: item.images.map(fixture) };
    const response = await pipe(prompt, { outputLogits: 'generation', maxNewTokens: 64 });
    expect(response.tokenIds).toEqual(item.awq.output_ids);
    expect(response.logits?.shape[0]).toBe(response.generateTokenLen);
    for (const [index, id] of response.tokenIds.entries()) {
      expect(argmax(row(response.logits, index))).toBe(id);
    }
    const first = row(response.logits, 0);
    expect(first).toEqual(await pipe.promptLogits(prompt));
    for (const { id, logit } of item.awq.first_top5) expect(first[id]).toBeCloseTo(logit, 2);
  });

  test('all holds the prompt too, with the same bits in chunks, batches and streams', async () => {
    const options = { outputLogits: 'all', outputLastHiddenState: 'all', maxNewTokens: 8 } as const;
    const alone = await pipe(PROMPT, options);
    const rows = alone.inputTokenLen - 1 + alone.generateTokenLen;
    expect(alone.logits?.shape[0]).toBe(rows);
    expect(alone.lastHiddenState?.shape[0]).toBe(rows);
    const generation = await pipe(PROMPT, { ...options, outputLastHiddenState: 'generation' });
    expect(row(generation.lastHiddenState, 0)).toEqual(
      row(alone.lastHiddenState, alone.inputTokenLen - 1),
    );

    const batch = await pipe(['Hello!', PROMPT, 'Spell the word tensor.'], [{}, options, {}]);
    expect(batch[1]?.logits).toEqual(alone.logits);
    expect(batch[1]?.lastHiddenState).toEqual(alone.lastHiddenState);
    for await (const { response } of pipe.stream(PROMPT, options)) {
      if (response !== undefined) expect(response.logits).toEqual(alone.logits);
    }
    await using small = await pipeline(embedded, { device: 'cpu', maxPrefillTokenNum: 5 });
    expect((await small(PROMPT, options)).logits).toEqual(alone.logits);
  });

  test('a completion that is cut short has rows for its own tokens only', async () => {
    const cut = await pipe(PROMPT, {
      outputLogits: 'generation',
      maxNewTokens: 4,
      ignoreEos: true,
    });
    expect(cut.finishReason).toBe('length');
    expect(cut.logits?.shape).toEqual([4, 384]);
  });
});

describe('perplexity and embeddings', () => {
  test('getPpl is the mean of -ln p that the logits give', async () => {
    const answer = await pipe(PROMPT, { outputLogits: 'all', maxNewTokens: 1 });
    const ids = await pipe.promptIds(PROMPT);
    let sum = 0;
    for (let i = 1; i < ids.length; i++) {
      sum -= logSoftmax(row(answer.logits, i - 1))[ids[i] ?? 0] ?? 0;
    }
    const wanted = sum / (ids.length - 1);
    expect(await pipe.getPpl(ids)).toBeCloseTo(wanted, 5);
    const list = await pipe.getPpl([ids, 'Hello there', [...ids].reverse()]);
    expect(list[0]).toBe(await pipe.getPpl(ids));
    expect(list[1]).toBe(await pipe.getPpl('Hello there'));
    expect(list[2]).toBeGreaterThan(wanted);
  });

  test('embed is the last hidden state, or the mean of all', async () => {
    const ids = await pipe.promptIds(PROMPT);
    const { lastHiddenState } = await pipe(PROMPT, {
      outputLastHiddenState: 'all',
      maxNewTokens: 1,
    });
    const last = await pipe.embed(ids, { normalize: false });
    expect(last).toEqual(row(lastHiddenState, ids.length - 1));
    const mean = await pipe.embed(ids, { normalize: false, pooling: 'mean' });
    for (const [column, value] of mean.entries()) {
      let sum = 0;
      for (let i = 0; i < ids.length; i++) sum += row(lastHiddenState, i)[column] ?? 0;
      expect(value).toBeCloseTo(sum / ids.length, 4);
    }
    const unit = await pipe.embed(ids);
    expect(Math.hypot(...unit)).toBeCloseTo(1, 5);
    const many = await pipe.embed(['a', PROMPT, ids, 'the last one']);
    expect(many[2]).toEqual(unit);
  });

  test('too long a prompt is refused, an aborted one rejects', async () => {
    const tooMany = new Int32Array(pipe.info.sessionLen + 1).fill(40);
    await expect(pipe.getPpl(tooMany)).rejects.toMatchObject({ code: 'ERR_TM_PROMPT_TOO_LONG' });
    const controller = new AbortController();
    const running = pipe.getPpl(
      Array.from({ length: 50 }, () => PROMPT),
      { signal: controller.signal },
    );
    controller.abort(new Error('enough'));
    await expect(running).rejects.toThrow('enough');
    expect((await pipe(PROMPT)).text).not.toBe('');
  });
});

describe('penalties and biases', () => {
  test('frequency and presence penalty are OpenAI’s formula, greedy', async () => {
    for (const [frequencyPenalty, presencePenalty] of [
      [1.5, 0],
      [0, 2],
      [-0.5, 0.25],
    ] as const) {
      const response = await pipe(PROMPT, {
        frequencyPenalty,
        presencePenalty,
        ignoreEos: true,
        maxNewTokens: 24,
        outputLogits: 'generation',
      });
      const counts = new Map<number, number>();
      for (const [index, id] of response.tokenIds.entries()) {
        const penalized = row(response.logits, index).map((logit, token) => {
          const count = counts.get(token) ?? 0;
          return count === 0 ? logit : logit - (count * frequencyPenalty + presencePenalty);
        });
        expect(argmax(penalized)).toBe(id);
        counts.set(id, (counts.get(id) ?? 0) + 1);
      }
    }
  });

  test('a bias of 100 forces a token, one of -100 keeps it away', async () => {
    const [forced = 0] = pipe.tokenizer.encode('Q');
    const { tokenIds } = await pipe(PROMPT, { logitBias: { [forced]: 100 }, maxNewTokens: 5 });
    expect(tokenIds).toEqual([forced, forced, forced, forced, forced]);
    const free = await pipe(PROMPT, { maxNewTokens: 1 });
    const avoided = free.tokenIds[0] ?? 0;
    const other = await pipe(PROMPT, { logitBias: { [avoided]: -100 }, maxNewTokens: 5 });
    expect(other.tokenIds).not.toContain(avoided);
  });

  test('bad words stay away in sampling too', async () => {
    const { text } = await pipe(PROMPT, { maxNewTokens: 12 });
    const word = text.trim().slice(0, 2);
    const answer = await pipe(PROMPT, { badWords: [word], maxNewTokens: 40 });
    expect(answer.text).not.toContain(word);
    const drawn = await pipe(PROMPT, {
      badWords: [word, 'e'],
      doSample: true,
      n: 4,
      randomSeed: 7,
      maxNewTokens: 40,
    });
    for (const choice of drawn.choices ?? []) expect(choice.text).not.toMatch('e');
  });

  test('top log probabilities are the log-softmax of the logits', async () => {
    const response = await pipe(PROMPT, {
      topLogprobs: 5,
      outputLogits: 'generation',
      frequencyPenalty: 1,
      maxNewTokens: 6,
    });
    for (const [index, entry] of (response.logprobs ?? []).entries()) {
      const wanted = logSoftmax(row(response.logits, index));
      expect(entry.logprob).toBeCloseTo(wanted[entry.tokenId] ?? 0, 4);
      expect(entry.topLogprobs).toHaveLength(5);
      for (const [id, logprob] of entry.topLogprobs)
        expect(logprob).toBeCloseTo(wanted[id] ?? 0, 4);
    }
    expect(response.logprobs).toHaveLength(response.generateTokenLen);
  });
});

describe('choices and hooks', () => {
  test('n choices are n requests with the seeds one after the other', async () => {
    const options = { doSample: true, temperature: 1.5, maxNewTokens: 20 } as const;
    // Nothing it was trained for: of what it knows, the model is too sure for two answers to differ.
    const prompt = 'Sort these words: b, a';
    const { choices } = await pipe(prompt, { ...options, n: 4, randomSeed: 100 });
    const single = await pipe(
      Array.from({ length: 4 }, () => prompt),
      Array.from({ length: 4 }, (_, i) => ({ ...options, randomSeed: 100 + i })),
    );
    expect(choices?.map(({ tokenIds }) => tokenIds)).toEqual(
      single.map(({ tokenIds }) => tokenIds),
    );
    expect(new Set(choices?.map(({ text }) => text)).size).toBeGreaterThan(1);
  });

  test('a processor that changes nothing changes nothing, sampled or greedy', async () => {
    for (const options of [
      { maxNewTokens: 16 },
      { maxNewTokens: 16, doSample: true, topK: 0, topP: 0.9, randomSeed: 3 },
    ]) {
      const plain = await pipe(PROMPT, options);
      const hooked = await pipe(PROMPT, { ...options, logitsProcessor: () => undefined });
      expect(hooked.tokenIds).toEqual(plain.tokenIds);
    }
  });

  test('a processor decides, beside free requests, in streams', async () => {
    const wanted = pipe.tokenizer.encode('tensors');
    const prompt = await pipe.promptIds(PROMPT);
    const logitsProcessor = (ids: Int32Array, logits: Float32Array): void => {
      expect([...ids.subarray(0, prompt.length)]).toEqual([...prompt]);
      logits[wanted[ids.length - prompt.length] ?? 0] = 1e4;
    };
    const free = await pipe('Hello!');
    const [same, forced] = await pipe(
      ['Hello!', PROMPT],
      [{}, { logitsProcessor, maxNewTokens: wanted.length }],
    );
    expect(forced?.text).toBe('tensors');
    expect(same?.tokenIds).toEqual(free.tokenIds);
    let text = '';
    const options = { logitsProcessor, maxNewTokens: wanted.length };
    for await (const part of pipe.stream(PROMPT, options)) text += part.text;
    expect(text).toBe('tensors');
  });

  test('an exception ends its own request', async () => {
    const logitsProcessor = (): never => {
      throw new RangeError('mine');
    };
    await expect(pipe(PROMPT, { logitsProcessor })).rejects.toMatchObject({
      code: 'ERR_TM_LOGITS_PROCESSOR',
      cause: expect.any(RangeError),
    });
    await expect(
      pipe(PROMPT, { logitsProcessor: (_, logits) => logits.fill(Number.NaN) }),
    ).rejects.toMatchObject({ code: 'ERR_TM_INVALID_ARGUMENT' });
    expect((await pipe(PROMPT)).finishReason).toBe('stop');
    expect(pipe.stats().running).toBe(0);
  });
});
