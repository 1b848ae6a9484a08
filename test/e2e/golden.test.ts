// The float32 reference's greedy answers: prompt ids, generated ids and first logits must agree
// for every case, one at a time and all in one batch. Each golden file names the weights it speaks of
// by their SHA-256: golden.json those of the embedded model, golden-first.json an older model's.
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { ChatMessageInput, ContentPartInput } from '../../lib/messages.js';
import { pipeline } from '../../lib/open-pipeline.js';
import type { Pipeline } from '../../lib/pipeline.js';
import { embedded, findBf16, fixture } from './support/paths.js';

// The reference adds in another order; its logits are stored with 5 decimals.
const LOGIT_TOLERANCE = 1e-3;
const MAX_NEW_TOKENS = 64;

interface Expected {
  readonly output_ids: readonly number[];
  readonly text: string;
  readonly first_top5: readonly { readonly id: number; readonly logit: number }[];
  readonly finished: boolean;
}

type Variant = 'awq' | 'bf16';

interface GoldenCase {
  readonly id: string;
  readonly images: readonly string[];
  readonly messages: readonly {
    readonly role: 'system' | 'user' | 'assistant';
    readonly content: readonly { readonly type: 'image' | 'text'; readonly text?: string }[];
  }[];
  readonly input_ids: readonly number[];
  readonly awq?: Expected;
  readonly bf16?: Expected;
}

interface Golden {
  readonly weights: { readonly [variant in Variant]?: string };
  readonly items: readonly GoldenCase[];
}

/** The cases of the golden file that speaks of the weights in `folder`. */
function casesOf(
  folder: string,
  variant: Variant,
): readonly { readonly item: GoldenCase; readonly expected: Expected }[] {
  const weights = readFileSync(join(folder, 'model.safetensors'));
  const digest = createHash('sha256').update(weights).digest('hex');
  for (const name of ['golden.json', 'golden-first.json']) {
    const golden: Golden = JSON.parse(readFileSync(fixture(name), 'utf8'));
    if (golden.weights[variant] !== digest) continue;
    return golden.items.map((item) => {
      const expected = item[variant];
      if (expected === undefined) throw new Error(`${name}: ${item.id} lacks ${variant}`);
      return { item, expected };
    });
  }
  throw new Error(`no golden file speaks of the ${variant} weights in ${folder} (${digest})`);
}

function toMessages({ messages, images }: GoldenCase): ChatMessageInput[] {
  const files = [...images];
  return messages.map(({ role, content }) => ({
    role,
    content: content.map(({ type, text = '' }): ContentPartInput => {
      if (type === 'text') return { type, text };
      return { type, image: fixture(files.shift() ?? 'missing') };
    }),
  }));
}

function suite(variant: Variant, folder: string): void {
  describe(`tiny-internvl ${variant}`, () => {
    const cases = casesOf(folder, variant);
    let pipe: Pipeline;
    beforeAll(async () => {
      pipe = await pipeline(folder, { device: 'cpu' });
    });
    afterAll(() => pipe?.close());

    test('the golden file holds 34 cases', () => {
      expect(cases).toHaveLength(34);
    });

    test.each(cases.map((one) => [one.item.id, one] as const))('%s', async (_, one) => {
      const { item, expected } = one;
      const messages = toMessages(item);
      expect([...(await pipe.promptIds(messages))]).toEqual(item.input_ids);

      const logits = await pipe.promptLogits(messages);
      expect(logits.length).toBe(384);
      for (const { id, logit } of expected.first_top5) {
        expect(Math.abs((logits[id] ?? Number.NaN) - logit)).toBeLessThan(LOGIT_TOLERANCE);
      }

      const response = await pipe(messages, { maxNewTokens: MAX_NEW_TOKENS });
      expect(response.tokenIds).toEqual(expected.output_ids);
      expect(response.text).toBe(expected.text);
      expect(response.finishReason).toBe(expected.finished ? 'stop' : 'length');
      expect(response.inputTokenLen).toBe(item.input_ids.length);
    });

    test('all cases in one batch give the same ids', async () => {
      const messages = cases.map(({ item }) => toMessages(item));
      const responses = await pipe(messages, { maxNewTokens: MAX_NEW_TOKENS });
      const wanted = cases.map(({ expected }) => expected.output_ids);
      expect(responses.map(({ tokenIds }) => tokenIds)).toEqual(wanted);
    });
  });
}

suite('awq', embedded);

const bf16 = findBf16();
if (bf16 !== undefined) {
  suite('bf16', bf16);
} else {
  console.log('SKIP: tiny-internvl bf16: set TURBOMIND_FIXTURES to a folder that holds bf16/');
  describe.skip('tiny-internvl bf16', () => {
    test('needs the bf16 weights', () => undefined);
  });
}
