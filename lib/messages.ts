// Turns every accepted prompt form into conversations: lists of messages whose content is a list
// of text and image parts. Image sources stay opaque here (lib/image.ts decodes them); templates
// and tokens are lib/chat.ts's. Runs on the JS thread, touches no file.

import { TurbomindError } from './errors.js';
import type {
  ChatRole,
  ImageSource,
  PromptInput,
  RawImage,
  SharpLike,
  TextPart,
} from './prompts.js';

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

/** A picture at its place in a message, after normalisation. */
export interface ImagePart {
  readonly type: 'image';
  readonly image: ImageSource;
  readonly maxDynamicPatch?: number;
}

export type ContentPart = TextPart | ImagePart;

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

/** Most tiles for OpenAI's `detail`; the numbers are LMDeploy's. */
const DETAIL_TILES: ReadonlyMap<string, number> = new Map([
  ['low', 6],
  ['medium', 12],
  ['high', 24],
]);

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
    throw invalid(
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
  if (isRecord(value)) {
    if (isMessageLike(value)) {
      throw invalid(`${where} is a message on its own; put it in a list: [{ role, content }]`);
    }
    return readTextWithImages(value, where);
  }
  throw invalid(
    `${where} is ${describe(value)}; expected a string, { text, images } or a list of messages`,
  );
}

function readTextWithImages(value: Record<string, unknown>, where: string): ChatMessage[] {
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
  if (values.length === 0) throw invalid(`${where} has no messages`);
  const messages = values.map((value, index) => readMessage(value, `${where}[${index}]`));
  const isEmpty = messages.every((message) => message.content.length === 0);
  if (isEmpty) throw invalid(`${where} has no text and no image in any message`);
  return messages;
}

function readMessage(value: unknown, where: string): ChatMessage {
  if (!isRecord(value)) {
    throw invalid(`${where} is ${describe(value)}; expected a message { role, content }`);
  }
  rejectUnknownKeys(value, ['role', 'content'], where);
  const role = ROLES.find((known) => known === value.role);
  if (role === undefined) {
    throw invalid(`${where}.role is ${describe(value.role)}; expected one of ${quoteList(ROLES)}`);
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
    throw invalid(`${where} is ${describe(value)}; expected a string or a list of parts`);
  }
  const parts = value.map((part: unknown, index) => readPart(part, `${where}[${index}]`));
  if (role === 'user' && !parts.some((part) => part.type === 'image' || part.text !== '')) {
    throw invalid(`${where} is empty; a user message needs some text or an image`);
  }
  return parts;
}

function readPart(value: unknown, where: string): ContentPart {
  if (!isRecord(value)) {
    throw invalid(`${where} is ${describe(value)}; expected a part such as { type: 'text', text }`);
  }
  switch (value.type) {
    case 'text':
      rejectUnknownKeys(value, ['type', 'text'], where);
      if (typeof value.text !== 'string') {
        throw invalid(`${where}.text is ${describe(value.text)}; expected a string`);
      }
      return { type: 'text', text: wellFormed(value.text, `${where}.text`) };
    case 'image_url':
      rejectUnknownKeys(value, ['type', 'image_url'], where);
      return readImageUrl(value.image_url, `${where}.image_url`);
    case 'image':
      rejectUnknownKeys(value, ['type', 'image', 'maxDynamicPatch'], where);
      return imagePart(
        readImage(value.image, `${where}.image`),
        readTileLimit(value.maxDynamicPatch, `${where}.maxDynamicPatch`),
      );
    default:
      throw invalid(
        `${where}.type is ${describe(value.type)}; expected 'text', 'image_url' or 'image'`,
      );
  }
}

function readImageUrl(value: unknown, where: string): ImagePart {
  if (typeof value === 'string') return imagePart(readImage(value, where), undefined);
  if (!isRecord(value)) {
    throw invalid(`${where} is ${describe(value)}; expected { url } or a string`);
  }
  rejectUnknownKeys(value, ['url', 'detail', 'max_dynamic_patch'], where);
  if (typeof value.url !== 'string') {
    throw invalid(`${where}.url is ${describe(value.url)}; expected a string`);
  }
  const limit = readTileLimit(value.max_dynamic_patch, `${where}.max_dynamic_patch`);
  return imagePart(readImage(value.url, `${where}.url`), limit ?? readDetail(value.detail, where));
}

function readDetail(value: unknown, where: string): number | undefined {
  if (value === undefined || value === 'auto') return undefined;
  const tiles = typeof value === 'string' ? DETAIL_TILES.get(value) : undefined;
  if (tiles === undefined) {
    throw invalid(
      `${where}.detail is ${describe(value)}; expected 'auto', 'low', 'medium' or 'high'`,
    );
  }
  return tiles;
}

function readTileLimit(value: unknown, where: string): number | undefined {
  if (value === undefined) return undefined;
  if (typeof value !== 'number' || !Number.isInteger(value) || value < 1) {
    throw invalid(`${where} is ${describe(value)}; expected a whole number of tiles, at least 1`);
  }
  return value;
}

function imagePart(image: ImageSource, maxDynamicPatch: number | undefined): ImagePart {
  return maxDynamicPatch === undefined
    ? { type: 'image', image }
    : { type: 'image', image, maxDynamicPatch };
}

function readImage(value: unknown, where: string): ImageSource {
  if (typeof value === 'string' && value.trim() !== '') return value;
  if (value instanceof URL || value instanceof Uint8Array) return value;
  if (isSharpLike(value) || isRawImage(value)) return value;
  throw invalid(
    `${where} is ${describe(value)}; expected a path, a URL, image bytes (Uint8Array), a sharp ` +
      'instance or raw pixels { data, width, height, channels }',
  );
}

/** True for a sharp instance: an object with `metadata` and `toBuffer` functions. */
export function isSharpLike(value: unknown): value is SharpLike {
  // Sharp instances are duplex streams: objects, never functions.
  if (typeof value !== 'object' || value === null) return false;
  return (
    'metadata' in value &&
    typeof value.metadata === 'function' &&
    'toBuffer' in value &&
    typeof value.toBuffer === 'function'
  );
}

/** True for `{ data, width, height, channels }`; sizes are lib/image.ts's to check. */
export function isRawImage(value: unknown): value is RawImage {
  return (
    isRecord(value) &&
    value.data instanceof Uint8Array &&
    typeof value.width === 'number' &&
    typeof value.height === 'number' &&
    (value.channels === 1 || value.channels === 3 || value.channels === 4)
  );
}

function readText(value: unknown, where: string): string {
  if (typeof value !== 'string') {
    throw invalid(`${where} is ${describe(value)}; expected a string`);
  }
  if (value.trim() === '') throw invalid(`${where} is empty; a prompt needs some text`);
  return wellFormed(value, where);
}

/** Half a surrogate pair has no UTF-8 form, so no tokenizer can carry it. */
function wellFormed(text: string, where: string): string {
  if (LONE_SURROGATE.test(text)) {
    throw invalid(`${where} holds half a surrogate pair; it was cut inside a character`);
  }
  return text;
}

const LONE_SURROGATE = /\p{Surrogate}/u;

function rejectUnknownKeys(
  value: Record<string, unknown>,
  known: readonly string[],
  where: string,
): void {
  const unknown = Object.keys(value).find((key) => !known.includes(key));
  if (unknown !== undefined) {
    throw invalid(`${where} has an unknown key ${quote(unknown)}; known keys: ${quoteList(known)}`);
  }
}

function isMessageLike(value: unknown): boolean {
  return isRecord(value) && Object.hasOwn(value, 'role');
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function describe(value: unknown): string {
  if (value === null || value === undefined) return `${value}`;
  if (typeof value === 'string') return value === '' ? 'an empty string' : quote(value);
  if (typeof value === 'number' || typeof value === 'boolean') return `${value}`;
  if (Array.isArray(value)) return 'an array';
  return `a value of type ${typeof value}`;
}

function quote(text: string): string {
  const short = text.length > 40 ? `${text.slice(0, 40)}…` : text;
  return `'${short}'`;
}

function quoteList(names: readonly string[]): string {
  return names.map(quote).join(', ');
}

function invalid(message: string): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_PROMPT', `invalid prompt: ${message}`);
}
