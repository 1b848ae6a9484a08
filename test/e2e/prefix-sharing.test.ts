// What was computed is not computed again: turns of a chat, a shared system prompt, a second question
// about one picture. Answers are those of a pipeline that shares nothing.
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Pipeline, pipeline, TurbomindError } from '../../lib/index.js';
import type { ChatMessageInput } from '../../lib/messages.js';
import { fixture } from './support/paths.js';

const SYSTEM =
  'You answer questions about arithmetic, spelling and pictures. Answer in as few words as you can, ' +
  'and never explain how you came to an answer, unless somebody asks you to explain it at length.';

let pipe: Pipeline;
let plain: Pipeline;
beforeAll(async () => {
  pipe = await pipeline({ device: 'cpu', sessionLen: 2048 });
  plain = await pipeline({ device: 'cpu', sessionLen: 2048, enablePrefixCaching: false });
});
afterAll(async () => {
  await pipe?.close();
  await plain?.close();
});

describe('prefix sharing', () => {
  test('turns of a chat compute what is new', async () => {
    const messages: ChatMessageInput[] = [{ role: 'system', content: SYSTEM }];
    let computed = 0;
    for (const content of ['What is 27 + 45?', 'Spell the word house.', 'Reverse the word cat.']) {
      messages.push({ role: 'user', content });
      const response = await pipe(messages, { maxNewTokens: 40 });
      const alone = await plain(messages, { maxNewTokens: 40 });
      expect(response.tokenIds).toEqual(alone.tokenIds);
      expect(alone.cachedTokens).toBe(0);
      // Only the question and a few tokens around it are new.
      expect(response.cachedTokens).toBeGreaterThanOrEqual(computed);
      computed = response.inputTokenLen - 8;
      messages.push({ role: 'assistant', content: response.text });
    }
    const { prefixQueries, prefixHits } = pipe.stats();
    expect(prefixHits).toBeGreaterThan(0);
    expect(prefixHits).toBeLessThan(prefixQueries);
    expect(plain.stats().prefixHits).toBe(0);
  });

  test('prompts that run together share their system prompt', async () => {
    const prompts = ['What is 11 + 22?', 'Spell the word lamp.', 'Hello!', 'Spell the word tree.'];
    const ask = (content: string): ChatMessageInput[] => [
      { role: 'system', content: `${SYSTEM} Be polite.` },
      { role: 'user', content },
    ];
    const responses = await pipe(prompts.map(ask), { maxNewTokens: 24 });
    const alone = await plain(prompts.map(ask), { maxNewTokens: 24 });
    expect(responses.map(({ tokenIds }) => tokenIds)).toEqual(
      alone.map(({ tokenIds }) => tokenIds),
    );
    const shared = responses.filter(({ cachedTokens }) => cachedTokens > SYSTEM.length / 4);
    expect(shared.length).toBeGreaterThanOrEqual(prompts.length - 1);
  });

  test('a second question about a picture runs no vision tower', async () => {
    const images = [fixture('10-shapes-224x224.png')];
    const first = { text: 'What colour is the largest shape?', images };
    const second = { text: 'How many shapes are there?', images };
    const seen = await pipe(first);
    expect(seen.text).toBe('orange');
    expect(seen.timings.visionMs).toBeGreaterThan(0);
    const again = await pipe(second);
    expect(again.timings.visionMs).toBe(0);
    expect(again.cachedTokens).toBeGreaterThanOrEqual(64);
    expect(again.tokenIds).toEqual((await plain(second)).tokenIds);
    const other = await pipe({ ...second, images: [fixture('12-palette-640x360.png')] });
    expect(other.timings.visionMs).toBeGreaterThan(0);
  });

  test('answers of n share the prompt', async () => {
    const options = { doSample: true, n: 4, randomSeed: 5, maxNewTokens: 12 } as const;
    const response = await pipe(`${SYSTEM} Name a colour.`, options);
    const alone = await plain(`${SYSTEM} Name a colour.`, options);
    expect(response.choices?.map(({ tokenIds }) => tokenIds)).toEqual(
      alone.choices?.map(({ tokenIds }) => tokenIds),
    );
    for (const choice of response.choices?.slice(1) ?? []) {
      expect(choice.cachedTokens).toBeGreaterThan(choice.inputTokenLen / 2);
    }
  });
});

describe('the queue', () => {
  const busy = { ignoreEos: true, maxNewTokens: 1500 } as const;

  test('refuses what is too much, and what waited too long', async () => {
    await using narrow = await pipeline({
      device: 'cpu',
      sessionLen: 2048,
      maxBatchSize: 1,
      maxQueueSize: 1,
    });
    const controller = new AbortController();
    const first = narrow('Hello!', { ...busy, signal: controller.signal });
    first.catch(() => undefined);
    await expect.poll(() => narrow.stats().running).toBe(1);
    // The first of the two waits, which fills the queue.
    const [late, refused] = await narrow(['Hello!', 'Hello!'], { queueTimeoutMs: 50 });
    expect(late?.error).toBeInstanceOf(TurbomindError);
    expect(late?.error).toMatchObject({ code: 'ERR_TM_DEADLINE' });
    expect(refused?.error).toMatchObject({ code: 'ERR_TM_QUEUE_FULL' });
    controller.abort();
    await expect(first).rejects.toThrow();
    expect((await narrow('What is 27 + 45?')).text).toBe('72');
  });

  test('lets the higher priority go first, also past what runs', async () => {
    await using narrow = await pipeline({ device: 'cpu', sessionLen: 2048, maxBatchSize: 1 });
    const ended: string[] = [];
    const ask = async (name: string, maxNewTokens: number, priority: number): Promise<void> => {
      await narrow('Hello!', { ignoreEos: true, maxNewTokens, priority });
      ended.push(name);
    };
    const running = ask('running', 300, 0);
    await expect.poll(() => narrow.stats().running).toBe(1);
    await Promise.all([running, ask('low', 4, -1), ask('normal', 4, 0), ask('high', 4, 1)]);
    expect(ended[0]).toBe('high');
    expect(ended.at(-1)).toBe('low');
  });
});
