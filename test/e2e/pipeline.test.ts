// The embedded model through the public API: streams, stop words, aborts, batches, sampling.
import { setTimeout as wait } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Pipeline, pipeline } from '../../lib/index.js';
import { fixture } from './support/paths.js';

const LONG = { ignoreEos: true, maxNewTokens: 2000 } as const;
const PROMPTS = [
  'What is 27 + 45?',
  'Spell the word house.',
  'Reverse the word cat.',
  'Hello!',
  'What is the capital of France?',
  'Which is larger, 45 or 72?',
] as const;
let pipe: Pipeline;

beforeAll(async () => {
  pipe = await pipeline({ device: 'cpu' });
});
afterAll(() => pipe?.close());

// The engine gives up its blocks at the end of the step in which it learns of an abort.
async function expectAllFree(): Promise<void> {
  await expect
    .poll(() => ({ running: pipe.stats().running, waiting: pipe.stats().waiting }), {
      timeout: 10_000,
    })
    .toEqual({ running: 0, waiting: 0 });
  const { freeBlocks, totalBlocks } = pipe.stats();
  expect(freeBlocks).toBe(totalBlocks);
}

describe('answers', () => {
  test('about text and pictures', async () => {
    expect((await pipe('What is 27 + 45?')).text).toBe('72');
    const picture = {
      text: 'What colour is the largest shape?',
      images: [fixture('10-shapes-224x224.png')],
    };
    const response = await pipe(picture);
    expect(response.text).toBe('orange');
    expect(response.finishReason).toBe('stop');
    const { timings } = response;
    for (const value of Object.values(timings)) expect(value).toBeGreaterThanOrEqual(0);
    expect(timings.visionMs).toBeGreaterThan(0);
    expect(timings.firstTokenMs).toBeLessThanOrEqual(timings.totalMs);
    expect(timings.preprocessMs).toBeLessThanOrEqual(timings.firstTokenMs);
  });

  test('the same through every form of picture and prompt', async () => {
    const path = fixture('10-shapes-224x224.png');
    const text = 'What colour is the largest shape?';
    const { readFile } = await import('node:fs/promises');
    const bytes = await readFile(path);
    const url = `data:image/png;base64,${bytes.toString('base64')}`;
    const responses = await pipe([
      { text, images: [path] },
      { text, images: [bytes] },
      [
        {
          role: 'user',
          content: [
            { type: 'image_url', image_url: { url } },
            { type: 'text', text },
          ],
        },
      ],
    ]);
    expect(responses.map((response) => response.text)).toEqual(['orange', 'orange', 'orange']);
  });

  test('limits on length hold', async () => {
    const short = await pipe('Hello!', { maxNewTokens: 3 });
    expect(short).toMatchObject({ finishReason: 'length', generateTokenLen: 3 });
    const long = await pipe('What is 27 + 45?', { minNewTokens: 20, maxNewTokens: 30 });
    expect(long.generateTokenLen).toBeGreaterThanOrEqual(20);
    const endless = await pipe('Hello!', { ignoreEos: true, maxNewTokens: 40 });
    expect(endless).toMatchObject({ finishReason: 'length', generateTokenLen: 40 });
  });

  test('banned words do not appear', async () => {
    const { text } = await pipe('Hello!', { badWords: ['Hello'], maxNewTokens: 40 });
    expect(text).not.toContain('Hello');
    expect((await pipe('Hello!')).text).toContain('Hello');
  });

  test('log probabilities belong to the tokens', async () => {
    const { logprobs, tokenIds } = await pipe('Hello!', { logprobs: 3 });
    expect(logprobs?.map(({ tokenId }) => tokenId)).toEqual(tokenIds);
    for (const { tokenId, logprob, topLogprobs } of logprobs ?? []) {
      expect(topLogprobs).toHaveLength(3);
      expect(topLogprobs[0]?.[0]).toBe(tokenId); // greedy: the best is taken
      expect(topLogprobs[0]?.[1]).toBeCloseTo(logprob, 5);
      expect(topLogprobs.reduce((sum, [, each]) => sum + Math.exp(each), 0)).toBeLessThanOrEqual(
        1.0001,
      );
    }
  });
});

describe('streams', () => {
  test('join to the same answer as a call', async () => {
    const whole = await pipe('Hello!');
    let text = '';
    const ids: number[] = [];
    let last: unknown;
    for await (const part of pipe.stream('Hello!')) {
      text += part.text;
      ids.push(...part.tokenIds);
      last = part.response;
    }
    expect(text).toBe(whole.text);
    expect(ids).toEqual(whole.tokenIds);
    expect(last).toMatchObject({ text: whole.text, finishReason: 'stop' });
  });

  test('break aborts and frees', async () => {
    for await (const part of pipe.stream('Hello!', LONG)) {
      if (part.tokenIds.length > 0) break;
    }
    await expectAllFree();
  });

  test('a slow reader loses nothing and gets few parts', async () => {
    let text = '';
    let numParts = 0;
    for await (const part of pipe.stream('Hello!', { ignoreEos: true, maxNewTokens: 200 })) {
      text += part.text;
      numParts += 1;
      await wait(20);
    }
    const whole = await pipe('Hello!', { ignoreEos: true, maxNewTokens: 200 });
    expect(text).toBe(whole.text);
    expect(numParts).toBeLessThan(200);
  });
});

describe('stop words', () => {
  test('of any length end the text before them', async () => {
    const { text } = await pipe('Hello!');
    for (const stop of ['can I', ' help you?', '!', 'o']) {
      const response = await pipe('Hello!', { stopWords: [stop] });
      expect(response.text).toBe(text.slice(0, text.indexOf(stop)));
      expect(response).toMatchObject({ finishReason: 'stop', matchedStop: stop });
    }
    await expectAllFree();
  });

  test('stop ids end it too', async () => {
    const [first, second = -1] = (await pipe('Hello!')).tokenIds;
    const response = await pipe('Hello!', { stopTokenIds: [second] });
    expect(response).toMatchObject({ finishReason: 'stop', matchedStop: second });
    expect(response.tokenIds).toEqual([first, second]);
  });
});

describe('aborts', () => {
  test('reject with the reason and free the blocks', async () => {
    const controller = new AbortController();
    const call = pipe(['Hello!', 'Hello!'], { ...LONG, signal: controller.signal });
    await expect.poll(() => pipe.stats().running).toBeGreaterThan(0);
    controller.abort(new Error('enough'));
    await expect(call).rejects.toThrow('enough');
    await expectAllFree();
    expect((await pipe('What is 27 + 45?')).text).toBe('72');
  });

  test('of one request leave the others alone', async () => {
    const wanted = (await pipe('Spell the word house.')).text;
    const controller = new AbortController();
    const doomed = pipe('Hello!', { ...LONG, signal: controller.signal });
    const others = pipe(['Spell the word house.', 'Spell the word house.']);
    controller.abort(new Error('enough'));
    await expect(doomed).rejects.toThrow('enough');
    expect((await others).map(({ text }) => text)).toEqual([wanted, wanted]);
  });
});

describe('batches', () => {
  test('give what each prompt gives alone, in order, whatever else runs', async () => {
    const alone: (readonly number[])[] = [];
    for (const prompt of PROMPTS) alone.push((await pipe(prompt)).tokenIds);
    const many = Array.from({ length: 40 }, (_, i) => PROMPTS[i % PROMPTS.length] ?? 'Hello!');
    const responses = await pipe(many);
    expect(responses.map(({ tokenIds }) => tokenIds)).toEqual(
      many.map((_, i) => alone[i % PROMPTS.length]),
    );
    await expectAllFree();
  });

  test('an image of a batch that cannot be read fails alone', async () => {
    const responses = await pipe(['Hello!', { text: 'a', images: ['/no/such.png'] }, 'Hello!']);
    expect(responses.map(({ finishReason }) => finishReason)).toEqual(['stop', 'error', 'stop']);
    expect(responses[1]?.error?.code).toBe('ERR_TM_INVALID_IMAGE');
  });
});

describe('sampling', () => {
  const options = { doSample: true, temperature: 1.5, topK: 0, maxNewTokens: 40, ignoreEos: true };

  test('a seed decides, alone or in a batch', async () => {
    const first = await pipe('Hello!', { ...options, randomSeed: 7 });
    const again = await pipe('Hello!', { ...options, randomSeed: 7 });
    expect(again.tokenIds).toEqual(first.tokenIds);
    const batch = await pipe(
      ['Hello!', 'Hello!', 'What is 27 + 45?'],
      [7, 8, 9].map((randomSeed) => ({ ...options, randomSeed })),
    );
    expect(batch[0]?.tokenIds).toEqual(first.tokenIds);
    expect(batch[1]?.tokenIds).not.toEqual(first.tokenIds);
  });

  test('topK 1 is greedy', async () => {
    const greedy = await pipe('Hello!');
    const one = await pipe('Hello!', { doSample: true, topK: 1, randomSeed: 3 });
    expect(one.tokenIds).toEqual(greedy.tokenIds);
  });
});

// The greatest difference between two lists of logits.
function distance(a: Float32Array, b: Float32Array): number {
  return a.reduce((most, value, i) => Math.max(most, Math.abs(value - (b[i] ?? Number.NaN))), 0);
}

describe('other settings', () => {
  const prompt = {
    text: 'What colour is the largest shape?',
    images: [fixture('10-shapes-224x224.png')],
  };

  test.each([{ threads: 1 }, { threads: 3 }, { maxPrefillTokenNum: 16, maxBatchSize: 2 }] as const)(
    '%o gives the same bits',
    async (settings) => {
      const wanted = await pipe(prompt);
      await using other = await pipeline({ device: 'cpu', sessionLen: 512, ...settings });
      expect((await other(prompt)).tokenIds).toEqual(wanted.tokenIds);
      const logits = await Promise.all([pipe.promptLogits(prompt), other.promptLogits(prompt)]);
      expect(distance(...logits)).toBe(0);
    },
  );

  // Dense layers add in another order there.
  test.each(['scalar', 'avx2', 'avx512', 'amx'] as const)(
    'the kernels of %s give the same answer',
    async (cpuIsa) => {
      // Plain loops need half a minute for a picture.
      const asked = cpuIsa === 'scalar' ? 'What is 27 + 45?' : prompt;
      const wanted = await pipe(asked);
      await using other = await pipeline({ device: 'cpu', sessionLen: 512, cpuIsa });
      expect((await other(asked)).tokenIds).toEqual(wanted.tokenIds);
      const logits = await Promise.all([pipe.promptLogits(asked), other.promptLogits(asked)]);
      expect(distance(...logits)).toBeLessThan(1e-3);
    },
  );

  test('speculation changes no token and no log probability, and saves steps', async () => {
    const asked = [
      { text: 'Spell the word house.' },
      { text: 'Count: one two three one two three one two three one two' },
      prompt,
    ];
    const settings = { ignoreEos: true, maxNewTokens: 150, logprobs: 2 } as const;
    const sampled = { ...settings, doSample: true, temperature: 0.3, randomSeed: 5 } as const;
    const penalised = { ...settings, repetitionPenalty: 1.05, minNewTokens: 20 } as const;
    const answers = async (method: 'ngram' | 'none') => {
      await using other = await pipeline({
        device: 'cpu',
        sessionLen: 1024,
        speculativeConfig: { method },
      });
      const responses = [];
      for (const options of [settings, sampled, penalised]) {
        responses.push(...(await other(asked, options)), await other('Hello!', options));
      }
      const { steps, draftedTokens, acceptedTokens } = other.stats();
      const lines = responses.map(({ tokenIds, logprobs, text }) => ({ tokenIds, logprobs, text }));
      return { lines, steps, draftedTokens, acceptedTokens };
    };
    const plain = await answers('none');
    const drafted = await answers('ngram');
    expect(drafted.lines).toEqual(plain.lines);
    expect(plain.draftedTokens).toBe(0);
    expect(drafted.acceptedTokens).toBeGreaterThan(0);
    expect(drafted.draftedTokens).toBeGreaterThanOrEqual(drafted.acceptedTokens);
    expect(drafted.steps).toBeLessThan(plain.steps);
  });

  test('few tiles make a short prompt', async () => {
    const wide = {
      text: 'How many shapes are there?',
      images: [fixture('12-palette-640x360.png')],
    };
    const all = (await pipe.promptIds(wide)).length;
    const few = (await pipe.promptIds(wide, { maxTiles: 1 })).length;
    expect(all - few).toBe(8 * 64);
  });

  test('two pipelines live side by side', async () => {
    await using other = await pipeline({ device: 'cpu', sessionLen: 1024 });
    const [a, b] = await Promise.all([pipe('Hello!'), other('Hello!')]);
    expect(a.tokenIds).toEqual(b.tokenIds);
  });

  test('info and stats tell the facts', () => {
    expect(pipe.info).toMatchObject({
      architecture: 'InternVLForConditionalGeneration',
      quantization: 'awq',
      sessionLen: 8192,
      hasVision: true,
    });
    const stats = pipe.stats();
    expect(stats.weightBytes).toBeGreaterThan(1e6);
    expect(stats.totalBlocks).toBeGreaterThan(0);
    expect(stats.completionTokens).toBeGreaterThan(0);
  });
});
