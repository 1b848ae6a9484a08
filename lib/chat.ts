// Messages to prompt ids: has the chat format render them, encodes the text, and grows each image
// placeholder to its image tokens. Text of messages can never write special tokens. How messages
// become text is chat-template.ts's. Runs on the JS thread.
import { createFormat, type Format, type RenderOptions } from './chat-template.js';
import type { Checkpoint, ImageSettings } from './checkpoint/checkpoint.js';
import { TurbomindError } from './errors.js';
import { type ChatMessage, type ContentPart, imagesOf } from './messages.js';
import { invalidPrompt } from './prompt-check.js';
import { type Tokenizer, tokensPattern } from './tokenizer.js';

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
