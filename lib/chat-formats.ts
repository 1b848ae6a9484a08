// Chat formats that checkpoints of the original InternVL layout name instead of carrying a
// template (`template` in config.json). One row a format.

/** A format of the ChatML kind. */
export interface ChatFormat {
  readonly name: string;
  /** Used when the conversation brings no system message. */
  readonly systemText: string;
  /** Ends every message. */
  readonly separator: string;
  /** Tokens that end an answer. */
  readonly stopTokens: readonly string[];
}

const INTERNLM2_SYSTEM =
  '你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。';

/** One row a format. */
export const CHAT_FORMATS: readonly ChatFormat[] = [
  {
    name: 'internvl2_5',
    systemText:
      '你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。',
    separator: '<|im_end|>\n',
    stopTokens: ['<|im_end|>'],
  },
  {
    name: 'internlm2-chat',
    systemText: INTERNLM2_SYSTEM,
    separator: '<|im_end|>',
    stopTokens: ['<|im_end|>'],
  },
  {
    name: 'Hermes-2',
    systemText: INTERNLM2_SYSTEM,
    separator: '<|im_end|>',
    stopTokens: ['<|im_end|>', '<|endoftext|>'],
  },
];

/** The format of that name, if we have it. */
export function findChatFormat(name: string): ChatFormat | undefined {
  return CHAT_FORMATS.find((format) => format.name === name);
}
