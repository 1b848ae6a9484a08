// The forms in which users may pass a prompt and its pictures. Types only; lib/messages.ts reads them,
// lib/image.ts reads the pictures.

/** Pixels as they are: rows from the top, no padding, 8 bits a channel, [height, width, channels]. */
export interface RawImage {
  readonly data: Uint8Array;
  readonly width: number;
  readonly height: number;
  /** 1 grey, 3 RGB, 4 RGBA (alpha is dropped). */
  readonly channels: 1 | 3 | 4;
}

/** What we use of a `sharp` instance; its own class is assignable to this. */
export interface SharpLike {
  metadata(): Promise<{ readonly width?: number; readonly height?: number }>;
  toBuffer(): Promise<Uint8Array>;
}

/**
 * A picture: a path, an `http(s):`, `file:` or `data:` URL, a URL object, the bytes of an image
 * file, raw pixels, or a sharp instance.
 */
export type ImageSource = string | URL | Uint8Array | RawImage | SharpLike;

export type ChatRole = 'system' | 'user' | 'assistant';

export interface TextPart {
  readonly type: 'text';
  readonly text: string;
}

/** OpenAI's form. `detail` and `max_dynamic_patch` bound the number of tiles of this image, each. */
export interface ImageUrlPart {
  readonly type: 'image_url';
  readonly image_url:
    | string
    | {
        readonly url: string;
        /** Most tiles: 'low' 6, 'medium' 12, 'high' 24; 'auto' is the model's own limit. */
        readonly detail?: 'auto' | 'low' | 'medium' | 'high';
        readonly max_dynamic_patch?: number;
      };
}

export interface ImageInputPart {
  readonly type: 'image';
  readonly image: ImageSource;
  /** Most tiles of this image, thumbnail not counted. */
  readonly maxDynamicPatch?: number;
}

export type ContentPartInput = TextPart | ImageUrlPart | ImageInputPart;

export interface ChatMessageInput {
  readonly role: ChatRole;
  readonly content: string | readonly ContentPartInput[];
}

/** One question with its pictures, which come before the text. */
export interface TextWithImages {
  readonly text: string;
  readonly images?: ImageSource | readonly ImageSource[];
}

/** One conversation in any form: a question, a question with pictures, or OpenAI messages. */
export type Prompt = string | TextWithImages | readonly ChatMessageInput[];

/** One prompt or a batch of prompts. An array of messages is one conversation, not a batch. */
export type PromptInput = Prompt | readonly Prompt[];
