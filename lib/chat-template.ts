// How messages become text: a Jinja template, compiled once, a format known by name, or plain text
// where a model has neither. What the text may hold and its token ids are chat.ts's. Runs on the JS
// thread.
import { Template } from '@huggingface/jinja';
import { CHAT_FORMATS, type ChatFormat, findChatFormat } from './chat-formats.js';
import type { Checkpoint } from './checkpoint/checkpoint.js';
import { TurbomindError } from './errors.js';
import type { ChatMessage, ChatRole, ContentPart } from './messages.js';
import { invalidPrompt } from './prompt-check.js';
import { tokenText } from './tokenizer-file.js';

export interface RenderOptions {
  /** End the prompt where the model's answer begins. Default true. */
  readonly addGenerationPrompt?: boolean;
  /** More variables for the template, such as `enable_thinking`. */
  readonly variables?: Readonly<Record<string, unknown>>;
}

/** How messages become text. */
export interface Format {
  /** Whether the tokenizer adds its BOS token; a template writes its own. */
  readonly addSpecialTokens: boolean;
  render(messages: readonly ChatMessage[], options: RenderOptions): string;
}

/** What a message's content becomes for the template: its list of parts, or one string. */
type ContentForm = 'parts' | 'string';

/** Values the template gets; `content` is a string or a list of parts. */
interface TemplateMessage {
  readonly role: ChatRole;
  readonly content: string | readonly TemplatePart[];
}

type TemplatePart = { readonly type: 'image' } | { readonly type: 'text'; readonly text: string };

/** The format of a model's folder. @throws TurbomindError ERR_TM_INVALID_TEMPLATE */
export function createFormat(checkpoint: Checkpoint): Format {
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

function invalidTemplate(problem: string, cause: unknown): TurbomindError {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new TurbomindError('ERR_TM_INVALID_TEMPLATE', `the chat template ${problem}: ${reason}`, {
    cause,
  });
}
