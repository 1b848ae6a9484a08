// Messages to prompt ids: renders the chat template, encodes it, and grows each image placeholder
// to its image tokens. Text of messages can never write special tokens. Runs on the JS thread.

import { Template } from '@huggingface/jinja';
import { CHAT_FORMATS, type ChatFormat, findChatFormat } from './chat-formats.js';
import type { Checkpoint, ImageSettings } from './checkpoint/checkpoint.js';
import { TurbomindError } from './errors.js';
import { type ChatMessage, type ChatRole, type ContentPart, imagesOf } from './messages.js';
import { type Tokenizer, tokensPattern, tokenText } from './tokenizer.js';

export interface RenderOptions {
  /** End the prompt where the model's answer begins. Default true. */
  readonly addGenerationPrompt?: boolean;
  /** More variables for the template, such as `enable_thinking`. */
  readonly variables?: Readonly<Record<string, unknown>>;
}

export interface ImageSpan {
  /** First image token in `ids`. */
  readonly tokenOffset: number;
  readonly numTokens: number;
}

export interface BuiltPrompt {
  readonly ids: Int32Array;
  /** One an image, in order. */
  readonly imageSpans: readonly ImageSpan[];
  /** The prompt as the model sees it, but with one image token an image. */
  readonly text: string;
}

/** The placeholder of older `-hf` templates, which their processor expands. */
const OLD_PLACEHOLDER = '<image>';

/** What a message's content becomes for the template: its list of parts, or one string. */
type ContentForm = 'parts' | 'string';

/** Values the template gets; `content` is a string or a list of parts. */
interface TemplateMessage {
  readonly role: ChatRole;
  readonly content: string | readonly TemplatePart[];
}

type TemplatePart = { readonly type: 'image' } | { readonly type: 'text'; readonly text: string };

/** A rendered prompt; `mark` breaks the special tokens that message texts wrote. */
interface Rendered {
  readonly text: string;
  readonly mark: string | undefined;
}

/**
 * A model's chat format, compiled once.
 *
 * @example
 * const builder = new PromptBuilder(checkpoint, tokenizer);
 * const { ids, imageSpans } = builder.build(messages, [13]); // one image of 12 tiles + thumbnail
 */
export class PromptBuilder {
  readonly #tokenizer: Tokenizer;
  readonly #image: ImageSettings | undefined;
  readonly #format: Format;
  readonly #forbidden: RegExp;
  readonly #forbiddenTexts: readonly string[];

  /** @throws TurbomindError ERR_TM_INVALID_TEMPLATE when the template cannot be compiled. */
  constructor(checkpoint: Checkpoint, tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
    this.#image = checkpoint.image;
    this.#format = createFormat(checkpoint);
    this.#forbiddenTexts = forbiddenTexts(tokenizer, checkpoint.image);
    this.#forbidden = startsOf(this.#forbiddenTexts);
  }

  /**
   * The chat template's text, one placeholder an image.
   *
   * @throws TurbomindError ERR_TM_INVALID_TEMPLATE, ERR_TM_INVALID_PROMPT.
   */
  render(messages: readonly ChatMessage[], options: RenderOptions = {}): string {
    const { text, mark } = this.#render(messages, options);
    return unmark(text, mark);
  }

  /**
   * Prompt ids with every image at its place.
   *
   * @param tilesPerImage tiles of each image, thumbnail counted, in order of appearance.
   * @throws TurbomindError ERR_TM_INVALID_TEMPLATE, ERR_TM_INVALID_PROMPT.
   */
  build(
    messages: readonly ChatMessage[],
    tilesPerImage: readonly number[],
    options: RenderOptions = {},
  ): BuiltPrompt {
    const numImages = imagesOf(messages).length;
    if (tilesPerImage.length !== numImages) {
      throw new TurbomindError(
        'ERR_TM_INVALID_ARGUMENT',
        `tile counts of ${tilesPerImage.length} images for messages with ${numImages}`,
      );
    }
    const { text: rendered, mark } = this.#render(messages, options);
    const text = this.#image ? wrapPlaceholders(rendered, this.#image, numImages) : rendered;
    const { addSpecialTokens } = this.#format;
    const ids = this.#tokenizer.encode(text, {
      addSpecialTokens,
      ...(mark === undefined ? {} : { literalMark: mark }),
    });
    return { ...this.#expand(ids, tilesPerImage), text: unmark(text, mark) };
  }

  #render(messages: readonly ChatMessage[], options: RenderOptions): Rendered {
    if (this.#image === undefined && imagesOf(messages).length > 0) {
      throw invalidPrompt('this model reads text only; leave the images out');
    }
    const { messages: escaped, mark } = this.#escape(messages);
    return { text: this.#format.render(escaped, options), mark };
  }

  /** Breaks the special tokens in message texts by a mark that no text holds. */
  #escape(messages: readonly ChatMessage[]): { messages: readonly ChatMessage[]; mark?: string } {
    const texts = messages.flatMap((message) =>
      message.content.flatMap((part) => (part.type === 'text' ? [part.text] : [])),
    );
    if (!texts.some((text) => this.#needsMark(text))) return { messages };
    const mark = MARKS.find((candidate) => !texts.some((text) => text.includes(candidate)));
    if (mark === undefined) {
      throw invalidPrompt('the text holds every noncharacter from U+FDD0 to U+FDEF');
    }
    const escapePart = (part: ContentPart): ContentPart =>
      part.type === 'text' ? { type: 'text', text: this.#markText(part.text, mark) } : part;
    return {
      mark,
      messages: messages.map(({ role, content }) => ({ role, content: content.map(escapePart) })),
    };
  }

  #needsMark(text: string): boolean {
    this.#forbidden.lastIndex = 0;
    return this.#forbidden.test(text) || this.#endsLikeForbidden(text);
  }

  #markText(text: string, mark: string): string {
    const broken = text.replace(this.#forbidden, `$1${mark}`);
    return this.#endsLikeForbidden(text) ? broken + mark : broken;
  }

  /** Two parts of a message may stand side by side and write a token together. */
  #endsLikeForbidden(text: string): boolean {
    return this.#forbiddenTexts.some((token) => {
      for (let length = Math.min(token.length - 1, text.length); length > 0; length -= 1) {
        if (text.endsWith(token.slice(0, length))) return true;
      }
      return false;
    });
  }

  /** One image token an image → tiles × tokensPerTile of them. */
  #expand(
    ids: readonly number[],
    tilesPerImage: readonly number[],
  ): Pick<BuiltPrompt, 'ids' | 'imageSpans'> {
    if (this.#image === undefined) return { ids: Int32Array.from(ids), imageSpans: [] };
    const { contextToken, tokensPerTile } = this.#image;
    const contextId = this.#tokenizer.idOf(contextToken);
    const numPlaceholders = ids.filter((id) => id === contextId).length;
    if (contextId === undefined || numPlaceholders !== tilesPerImage.length) {
      throw invalidPrompt(
        `the encoded prompt holds ${contextToken} ${numPlaceholders} times for ` +
          `${tilesPerImage.length} images; do not write ${contextToken} yourself`,
      );
    }
    const counts = tilesPerImage.map((tiles) => tiles * tokensPerTile);
    const total = counts.reduce((sum, count) => sum + count, ids.length - counts.length);
    const expanded = new Int32Array(total);
    const imageSpans: ImageSpan[] = [];
    let end = 0;
    for (const id of ids) {
      const numTokens = id === contextId ? (counts[imageSpans.length] ?? 0) : 1;
      if (id === contextId) imageSpans.push({ tokenOffset: end, numTokens });
      expanded.fill(id, end, end + numTokens);
      end += numTokens;
    }
    return { ids: expanded, imageSpans };
  }
}

/** `new PromptBuilder(checkpoint, tokenizer).build(messages, tilesPerImage, options)`. */
export function buildPrompt(
  checkpoint: Checkpoint,
  tokenizer: Tokenizer,
  messages: readonly ChatMessage[],
  tilesPerImage: readonly number[],
  options: RenderOptions = {},
): BuiltPrompt {
  return new PromptBuilder(checkpoint, tokenizer).build(messages, tilesPerImage, options);
}

/** Noncharacters: valid in strings, never text. */
const MARKS: readonly string[] = Array.from({ length: 32 }, (_, index) =>
  String.fromCharCode(0xfdd0 + index),
);

function unmark(text: string, mark: string | undefined): string {
  return mark === undefined ? text : text.replaceAll(mark, '');
}

/** What message texts must not be able to write. */
function forbiddenTexts(tokenizer: Tokenizer, image: ImageSettings | undefined): string[] {
  const placeholders = image
    ? [OLD_PLACEHOLDER, image.startToken, image.contextToken, image.endToken]
    : [];
  return [...new Set([...tokenizer.specialTokens, ...placeholders])];
}

/** Matches the first character of every occurrence, overlapping ones included. */
function startsOf(texts: readonly string[]): RegExp {
  if (texts.length === 0) return /(?!)/g;
  return new RegExp(`(?=${tokensPattern(texts)})(.)`, 'gsu');
}

/**
 * Puts every placeholder that the template wrote between the image's start and end tokens.
 * Marked ones in message texts do not match.
 */
function wrapPlaceholders(text: string, image: ImageSettings, numImages: number): string {
  const { startToken, contextToken, endToken } = image;
  const [start, end] = [startToken, endToken].map((token) => tokensPattern([token]));
  const placeholder = tokensPattern([contextToken, OLD_PLACEHOLDER]);
  const pattern = new RegExp(`(?:${start})?(?:${placeholder})(?:${end})?`, 'gu');
  let count = 0;
  const wrapped = text.replace(pattern, () => {
    count += 1;
    return `${startToken}${contextToken}${endToken}`;
  });
  if (count !== numImages) {
    throw new TurbomindError(
      'ERR_TM_INVALID_TEMPLATE',
      `the chat template wrote ${count} image placeholders for ${numImages} images`,
    );
  }
  return wrapped;
}

/** How messages become text. */
interface Format {
  /** Whether the tokenizer adds its BOS token; a template writes its own. */
  readonly addSpecialTokens: boolean;
  render(messages: readonly ChatMessage[], options: RenderOptions): string;
}

function createFormat(checkpoint: Checkpoint): Format {
  const { chatTemplate, image } = checkpoint;
  const placeholder = `${image?.contextToken ?? ''}\n`;
  if (chatTemplate === undefined) return PLAIN_FORMAT;
  if (chatTemplate.type === 'jinja') {
    return new JinjaFormat(chatTemplate.template, templateTokens(checkpoint), placeholder);
  }
  const format = findChatFormat(chatTemplate.name);
  if (format === undefined) {
    const known = CHAT_FORMATS.map((candidate) => candidate.name).join(', ');
    throw new TurbomindError(
      'ERR_TM_INVALID_TEMPLATE',
      `config.json: template is "${chatTemplate.name}"; supported without a Jinja template: ` +
        `${known}; or add a chat_template.jinja to the folder`,
    );
  }
  return namedFormat(format, placeholder);
}

/** A model without a chat format continues text. */
const PLAIN_FORMAT: Format = {
  addSpecialTokens: true,
  render: (messages) => {
    const [message, ...others] = messages;
    const parts = message?.content ?? [];
    if (
      message?.role !== 'user' ||
      others.length > 0 ||
      parts.some(({ type }) => type !== 'text')
    ) {
      throw invalidPrompt(
        'this model has no chat template, so it takes plain text only: pass a string, or add a ' +
          'chat_template.jinja to the model folder',
      );
    }
    return flatten(parts, '');
  },
};

function namedFormat(format: ChatFormat, placeholder: string): Format {
  return {
    addSpecialTokens: true,
    render: (messages, { addGenerationPrompt = true }) => {
      const { systemText, separator } = format;
      const turn = (role: ChatRole, text: string): string =>
        `<|im_start|>${role}\n${text}${separator}`;
      const system = messages[0]?.role === 'system' ? '' : turn('system', systemText);
      const turns = messages.map(({ role, content }) => turn(role, flatten(content, placeholder)));
      return `${system}${turns.join('')}${addGenerationPrompt ? '<|im_start|>assistant\n' : ''}`;
    },
  };
}

/** The special tokens that templates refer to by name. */
function templateTokens(checkpoint: Checkpoint): Record<string, string> {
  const names = ['bos_token', 'eos_token', 'pad_token', 'unk_token'];
  return Object.fromEntries(
    names.flatMap((name) => {
      const text = tokenText(checkpoint.tokenizerConfig[name]);
      return text === undefined ? [] : [[name, text]];
    }),
  );
}

const PROBE = 'turbomind probe';

class JinjaFormat implements Format {
  readonly addSpecialTokens = false;
  readonly #template: Template;
  readonly #tokens: Readonly<Record<string, string>>;
  readonly #placeholder: string;
  readonly #forms = new Map<ChatRole, ContentForm>();

  constructor(template: string, tokens: Record<string, string>, placeholder: string) {
    try {
      this.#template = new Template(template);
    } catch (cause) {
      throw invalidTemplate('cannot be compiled', cause);
    }
    this.#tokens = tokens;
    this.#placeholder = placeholder;
  }

  render(messages: readonly ChatMessage[], options: RenderOptions): string {
    const shaped = messages.map(({ role, content }): TemplateMessage => {
      return { role, content: this.#shape(role, content) };
    });
    try {
      return this.#run(shaped, options);
    } catch (cause) {
      throw invalidTemplate('cannot render these messages', cause);
    }
  }

  #run(messages: readonly TemplateMessage[], options: RenderOptions): string {
    return this.#template.render({
      ...this.#tokens,
      ...options.variables,
      messages,
      add_generation_prompt: options.addGenerationPrompt ?? true,
    });
  }

  #shape(role: ChatRole, content: readonly ContentPart[]): TemplateMessage['content'] {
    if (this.#formOf(role) === 'string') return flatten(content, this.#placeholder);
    return content.map((part) =>
      part.type === 'text' ? { type: 'text', text: part.text } : { type: 'image' },
    );
  }

  /** Templates read content as a string, as a list, or as either; trying is the only way to know. */
  #formOf(role: ChatRole): ContentForm {
    const known = this.#forms.get(role);
    if (known !== undefined) return known;
    const form = this.#takesParts(role) ? 'parts' : 'string';
    this.#forms.set(role, form);
    return form;
  }

  #takesParts(role: ChatRole): boolean {
    const probe: TemplateMessage = { role, content: [{ type: 'text', text: PROBE }] };
    const user: TemplateMessage = { role: 'user', content: this.#shapeProbe(role) };
    const conversations: Record<ChatRole, TemplateMessage[]> = {
      user: [probe],
      system: [probe, user],
      assistant: [user, probe],
    };
    try {
      const text = this.#run(conversations[role], {});
      // A list that was printed instead of read shows its keys.
      return text.includes(PROBE) && !/["']type["']/.test(text);
    } catch {
      return false; // the template wants strings
    }
  }

  /** Content of the user message beside a probed one, in the form that user messages take. */
  #shapeProbe(role: ChatRole): TemplateMessage['content'] {
    return role === 'user' ? '' : this.#shape('user', [{ type: 'text', text: 'x' }]);
  }
}

function flatten(content: readonly ContentPart[], placeholder: string): string {
  return content.map((part) => (part.type === 'text' ? part.text : placeholder)).join('');
}

function invalidPrompt(message: string): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_PROMPT', `invalid prompt: ${message}`);
}

function invalidTemplate(problem: string, cause: unknown): TurbomindError {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new TurbomindError('ERR_TM_INVALID_TEMPLATE', `the chat template ${problem}: ${reason}`, {
    cause,
  });
}
