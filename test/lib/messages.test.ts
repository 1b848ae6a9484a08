import fc from 'fast-check';
import sharp, { type Sharp } from 'sharp';
import { describe, expect, expectTypeOf, test } from 'vitest';
import { TurbomindError } from '../../lib/errors.js';
import {
  type ChatMessage,
  type ImageSource,
  imagesOf,
  normalizePrompts,
  type PromptInput,
} from '../../lib/messages.js';
import { expectError } from './model-folder.js';

const hello: ChatMessage[] = [{ role: 'user', content: [{ type: 'text', text: 'Hello' }] }];
const raw = { data: new Uint8Array(3), width: 1, height: 1, channels: 3 } as const;

describe('one prompt', () => {
  test.each<[string, PromptInput]>([
    ['a string', 'Hello'],
    ['text without images', { text: 'Hello' }],
    ['a conversation', [{ role: 'user', content: 'Hello' }]],
    ['a conversation of parts', [{ role: 'user', content: [{ type: 'text', text: 'Hello' }] }]],
  ])('may be %s', (_, prompt) => {
    expect(normalizePrompts(prompt)).toEqual({ conversations: [hello], isBatch: false });
  });

  test('puts images before the text', () => {
    const { conversations } = normalizePrompts({ text: 'Hello', images: ['a.png', raw] });
    expect(conversations).toEqual([
      [
        {
          role: 'user',
          content: [
            { type: 'image', image: 'a.png' },
            { type: 'image', image: raw },
            { type: 'text', text: 'Hello' },
          ],
        },
      ],
    ]);
    expect(
      normalizePrompts({ text: 'Hello', images: 'a.png' }).conversations[0]?.[0]?.content,
    ).toHaveLength(2);
  });

  test('keeps messages, their order, and empty answers', () => {
    const { conversations } = normalizePrompts([
      { role: 'system', content: '' },
      { role: 'user', content: 'a' },
      { role: 'assistant', content: '' },
      {
        role: 'user',
        content: [
          { type: 'text', text: '' },
          { type: 'image', image: raw },
        ],
      },
    ]);
    expect(conversations[0]).toEqual([
      { role: 'system', content: [] },
      { role: 'user', content: [{ type: 'text', text: 'a' }] },
      { role: 'assistant', content: [] },
      {
        role: 'user',
        content: [
          { type: 'text', text: '' },
          { type: 'image', image: raw },
        ],
      },
    ]);
  });

  test('reads every form of an image, in order', () => {
    const bytes = Buffer.from('png');
    const url = new URL('file:///a.png');
    const picture = sharp({ create: { width: 1, height: 1, channels: 3, background: 'red' } });
    const { conversations } = normalizePrompts([
      {
        role: 'user',
        content: [
          { type: 'image_url', image_url: { url: 'https://x/a.png' } },
          { type: 'image_url', image_url: 'data:image/png;base64,AA==' },
          { type: 'image', image: bytes },
          { type: 'image', image: url },
          { type: 'image', image: picture },
          { type: 'image', image: raw },
        ],
      },
    ]);
    const images = imagesOf(conversations[0] ?? []).map((part) => part.image);
    expect(images).toEqual([
      'https://x/a.png',
      'data:image/png;base64,AA==',
      bytes,
      url,
      picture,
      raw,
    ]);
    expect(images[4]).toBe(picture);
  });

  test('bounds the tiles of an image', () => {
    const limit = (image_url: {
      url: string;
      detail?: 'auto' | 'low' | 'medium' | 'high';
      max_dynamic_patch?: number;
    }) =>
      imagesOf(
        normalizePrompts([{ role: 'user', content: [{ type: 'image_url', image_url }] }])
          .conversations[0] ?? [],
      )[0]?.maxDynamicPatch;
    expect(limit({ url: 'a' })).toBeUndefined();
    expect(limit({ url: 'a', detail: 'auto' })).toBeUndefined();
    expect(
      (['low', 'medium', 'high'] as const).map((detail) => limit({ url: 'a', detail })),
    ).toEqual([6, 12, 24]);
    expect(limit({ url: 'a', detail: 'low', max_dynamic_patch: 3 })).toBe(3);
    expect(limit({ url: 'a', detail: 'low', max_dynamic_patch: 9 })).toBe(6);
    expect(limit({ url: 'a', detail: 'auto', max_dynamic_patch: 9 })).toBe(9);
    const part = { type: 'image', image: 'a', maxDynamicPatch: 2 } as const;
    expect(
      normalizePrompts([{ role: 'user', content: [part] }]).conversations[0]?.[0]?.content,
    ).toEqual([part]);
  });
});

describe('a batch', () => {
  test('is a list of prompts of any forms, in order', () => {
    const { conversations, isBatch } = normalizePrompts([
      'Hello',
      { text: 'Hello' },
      [{ role: 'user', content: 'Hello' }],
    ]);
    expect(conversations).toEqual([hello, hello, hello]);
    expect(isBatch).toBe(true);
  });

  test('may have one member', () => {
    expect(normalizePrompts(['Hello'])).toEqual({ conversations: [hello], isBatch: true });
    expect(normalizePrompts([[{ role: 'user', content: 'Hello' }]]).isBatch).toBe(true);
  });
});

describe('a mistake is named with its place', () => {
  const message = (content: unknown, role: unknown = 'user') => [{ role, content }];

  test.each<[string, unknown, RegExp]>([
    ['nothing', undefined, /prompt is undefined; expected a string/],
    ['a number', 7, /prompt is 7; expected/],
    ['an empty string', '', /prompt is empty/],
    ['only spaces', ' \n ', /prompt is empty/],
    ['an empty batch', [], /batch is empty/],
    ['an empty member', ['a', ''], /prompt\[1\] is empty/],
    ['an empty conversation', ['a', []], /prompt\[1\] has no messages/],
    ['a null member', [null], /prompt\[0\] is null/],
    ['a message on its own', { role: 'user', content: 'a' }, /put it in a list/],
    [
      'a message among strings',
      ['a', { role: 'user', content: 'b' }],
      /prompt\[0\] is 'a'; expected a message/,
    ],
    [
      'an unknown key',
      { text: 'a', image: 'b' },
      /unknown key 'image'; known keys: 'text', 'images'/,
    ],
    ['no text', { images: ['a'] }, /prompt.text is undefined/],
    ['an empty image', { text: 'a', images: [''] }, /prompt.images\[0\] is an empty string/],
    [
      'an image of a number',
      { text: 'a', images: [3] },
      /prompt.images\[0\] is 3; expected a path/,
    ],
    [
      'two channels',
      { text: 'a', images: [{ ...raw, channels: 2 }] },
      /prompt.images\[0\] is a value of type object/,
    ],
    [
      'an unknown role',
      message('a', 'tool'),
      /prompt\[0\].role is 'tool'; expected one of 'system', 'user'/,
    ],
    [
      'an unknown message key',
      [{ role: 'user', content: 'a', name: 'b' }],
      /prompt\[0\] has an unknown key 'name'/,
    ],
    [
      'content of a number',
      message(1),
      /prompt\[0\].content is 1; expected a string or a list of parts/,
    ],
    ['an empty question', message(''), /prompt\[0\].content is empty/],
    ['a question of no parts', message([]), /prompt\[0\].content is empty; a user message needs/],
    [
      'a question of empty parts',
      message([{ type: 'text', text: '' }]),
      /prompt\[0\].content is empty/,
    ],
    ['nothing said at all', message('', 'system'), /prompt has no text and no image/],
    ['a part that is a string', message(['a']), /content\[0\] is 'a'; expected a part/],
    [
      'an unknown part',
      message([{ type: 'video_url' }]),
      /content\[0\].type is 'video_url'; expected 'text'/,
    ],
    ['an unknown part key', message([{ type: 'text', text: 'a', x: 1 }]), /unknown key 'x'/],
    ['text of a number', message([{ type: 'text', text: 1 }]), /content\[0\].text is 1/],
    ['no url', message([{ type: 'image_url', image_url: {} }]), /image_url.url is undefined/],
    [
      'an unknown url key',
      message([{ type: 'image_url', image_url: { url: 'a', size: 1 } }]),
      /unknown key 'size'/,
    ],
    [
      'an unknown detail',
      message([{ type: 'image_url', image_url: { url: 'a', detail: 'max' } }]),
      /detail is 'max'/,
    ],
    [
      'an unknown detail beside a limit',
      message([
        { type: 'image_url', image_url: { url: 'a', detail: 'max', max_dynamic_patch: 3 } },
      ]),
      /detail is 'max'/,
    ],
    [
      'no tiles',
      message([{ type: 'image', image: 'a', maxDynamicPatch: 0 }]),
      /maxDynamicPatch is 0/,
    ],
    ['no image', message([{ type: 'image' }]), /content\[0\].image is undefined/],
    ['half a character', `a\ud83d`, /half a surrogate pair/],
    [
      'half a character in a part',
      message([{ type: 'text', text: '\ude00' }]),
      /text holds half a surrogate/,
    ],
  ])('%s', async (_, prompt, pattern) => {
    // Callers without types pass anything.
    const input: PromptInput = JSON.parse('null') ?? prompt;
    await expectError(() => normalizePrompts(input), 'ERR_TM_INVALID_PROMPT', pattern);
  });

  test('any value is read or refused with our error', () => {
    const part = fc.oneof(
      fc.record(
        { type: fc.constantFrom('text', 'image', 'image_url'), text: fc.string() },
        { requiredKeys: ['type'] },
      ),
      fc.jsonValue(),
    );
    const anyMessage = fc.record({
      role: fc.constantFrom('user', 'system', 'x'),
      content: fc.oneof(fc.string(), fc.array(part)),
    });
    const prompt = fc.oneof(
      fc.anything(),
      fc.array(anyMessage),
      fc.array(fc.array(anyMessage)),
      fc.array(fc.string()),
    );
    fc.assert(
      fc.property(prompt, (value) => {
        const input: PromptInput = JSON.parse('null') ?? value;
        try {
          const { conversations } = normalizePrompts(input);
          expect(conversations.length).toBeGreaterThan(0);
        } catch (error) {
          expect(error).toBeInstanceOf(TurbomindError);
        }
      }),
    );
  });
});

test('a sharp instance is an image source by its type, too', () => {
  expectTypeOf<Sharp>().toExtend<ImageSource>();
});
