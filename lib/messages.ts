// Turns every accepted prompt form into conversations: lists of messages whose content is a list
// of text and image parts, which message-parts.ts reads. Image sources stay opaque here (lib/image.ts
// decodes them); templates and tokens are lib/chat.ts's. Runs on the JS thread, touches no file.
import { isJsonObject, type JsonObject } from './checkpoint/json.js';
import { type ContentPart, type ImagePart, readImage, readPart } from './message-parts.js';
import {
  describe,
  invalidPrompt,
  quoteList,
  readText,
  rejectUnknownKeys,
  wellFormed,
} from './prompt-check.js';
import type { ChatRole, PromptInput } from './prompts.js';

export type { ContentPart, ImagePart } from './message-parts.js';
export type {
  ChatMessageInput,
  ChatRole,
  ContentPartInput,
  ImageInputPart,
  ImageSource,
  ImageUrlPart,
  Prompt,
  PromptInput,
  RawImage,
  SharpLike,
  TextPart,
  TextWithImages,
} from './prompts.js';

/** A message after normalisation: content is always a list of parts. */
export interface ChatMessage {
  readonly role: ChatRole;
  readonly content: readonly ContentPart[];
}

export interface NormalizedPrompts {
  /** One conversation a prompt, in the caller's order. */
  readonly conversations: readonly (readonly ChatMessage[])[];
  /** True when the caller passed a batch and so expects a list of answers. */
  readonly isBatch: boolean;
}

const ROLES: readonly ChatRole[] = ['system', 'user', 'assistant'];

/**
 * Normalises a prompt or a batch of prompts.
 *
 * @example
 * normalizePrompts('Hello');                                   // one conversation
 * normalizePrompts(['What is 37 + 45?', 'Spell "tensor".']);   // a batch of two
 * normalizePrompts({ text: 'What is this?', images: ['a.png'] });
 * normalizePrompts([{ role: 'user', content: 'Hello' }]);      // one conversation
 * normalizePrompts([[{ role: 'user', content: 'Hello' }]]);    // a batch of one
 *
 * @throws TurbomindError ERR_TM_INVALID_PROMPT, naming the place of the mistake.
 */
export function normalizePrompts(input: PromptInput): NormalizedPrompts {
  const value: unknown = input;
  if (!Array.isArray(value) || value.some(isMessageLike)) {
    return { conversations: [readPrompt(value, 'prompt')], isBatch: false };
  }
  if (value.length === 0) {
    throw invalidPrompt(
      'the batch is empty; pass a string, { text, images }, messages, or a list of these',
    );
  }
  const items: unknown[] = value;
  return {
    conversations: items.map((item, index) => readPrompt(item, `prompt[${index}]`)),
    isBatch: true,
  };
}

/** The pictures of a conversation in the order in which their placeholders appear. */
export function imagesOf(conversation: readonly ChatMessage[]): ImagePart[] {
  return conversation.flatMap((message) =>
    message.content.flatMap((part) => (part.type === 'image' ? [part] : [])),
  );
}

function readPrompt(value: unknown, where: string): ChatMessage[] {
  if (typeof value === 'string') {
    return [{ role: 'user', content: [{ type: 'text', text: readText(value, where) }] }];
  }
  if (Array.isArray(value)) return readMessages(value, where);
  if (isJsonObject(value)) {
    if (isMessageLike(value)) {
      throw invalidPrompt(
        `${where} is a message on its own; put it in a list: [{ role, content }]`,
      );
    }
    return readTextWithImages(value, where);
  }
  throw invalidPrompt(
    `${where} is ${describe(value)}; expected a string, { text, images } or a list of messages`,
  );
}

function readTextWithImages(value: JsonObject, where: string): ChatMessage[] {
  rejectUnknownKeys(value, ['text', 'images'], where);
  const images = value.images ?? [];
  const list: unknown[] = Array.isArray(images) ? images : [images];
  const content: ContentPart[] = list.map((image, index) => ({
    type: 'image',
    image: readImage(image, `${where}.images[${index}]`),
  }));
  content.push({ type: 'text', text: readText(value.text, `${where}.text`) });
  return [{ role: 'user', content }];
}

function readMessages(values: readonly unknown[], where: string): ChatMessage[] {
  if (values.length === 0) throw invalidPrompt(`${where} has no messages`);
  const messages = values.map((value, index) => readMessage(value, `${where}[${index}]`));
  const isEmpty = messages.every((message) => message.content.length === 0);
  if (isEmpty) throw invalidPrompt(`${where} has no text and no image in any message`);
  return messages;
}

function readMessage(value: unknown, where: string): ChatMessage {
  if (!isJsonObject(value)) {
    throw invalidPrompt(`${where} is ${describe(value)}; expected a message { role, content }`);
  }
  rejectUnknownKeys(value, ['role', 'content'], where);
  const role = ROLES.find((known) => known === value.role);
  if (role === undefined) {
    throw invalidPrompt(
      `${where}.role is ${describe(value.role)}; expected one of ${quoteList(ROLES)}`,
    );
  }
  return { role, content: readContent(value.content, role, `${where}.content`) };
}

function readContent(value: unknown, role: ChatRole, where: string): ContentPart[] {
  if (typeof value === 'string') {
    // An empty answer or system text is legitimate history; an empty question is a mistake.
    const text = role === 'user' ? readText(value, where) : value;
    return text === '' ? [] : [{ type: 'text', text: wellFormed(text, where) }];
  }
  if (!Array.isArray(value)) {
    throw invalidPrompt(`${where} is ${describe(value)}; expected a string or a list of parts`);
  }
  const parts = value.map((part: unknown, index) => readPart(part, `${where}[${index}]`));
  if (role === 'user' && !parts.some((part) => part.type === 'image' || part.text !== '')) {
    throw invalidPrompt(`${where} is empty; a user message needs some text or an image`);
  }
  return parts;
}

/** A message, right or wrong: a list that holds one is a conversation and not a batch. */
export function isMessageLike(value: unknown): boolean {
  return isJsonObject(value) && Object.hasOwn(value, 'role');
}
