// Where a model folder keeps its chat template. lib/chat-template.ts compiles and renders it.

import { join } from 'node:path';
import { TurbomindError } from '../errors.js';
import {
  isJsonObject,
  type JsonObject,
  jsonGet,
  readOptionalJsonFile,
  readOptionalTextFile,
} from './json.js';

/** Where the chat format comes from. */
export type ChatTemplateSource =
  | { readonly type: 'jinja'; readonly file: string; readonly template: string }
  | { readonly type: 'named'; readonly name: string };

/** A template file wins over tokenizer_config.json, and any template over a format's name. */
export async function readChatTemplate(
  root: string,
  tokenizerConfig: JsonObject,
  name: string | undefined,
): Promise<ChatTemplateSource | undefined> {
  const file = join(root, 'chat_template.jinja');
  const jinja = await readOptionalTextFile(file, 'ERR_TM_INVALID_TEMPLATE');
  if (jinja !== undefined) return { type: 'jinja', file, template: jinja };
  const wrapped = await readOptionalJsonFile(
    join(root, 'chat_template.json'),
    'ERR_TM_INVALID_TEMPLATE',
  );
  const sources: readonly (readonly [string, JsonObject])[] = [
    ['chat_template.json', wrapped ?? {}],
    ['tokenizer_config.json', tokenizerConfig],
  ];
  for (const [source, json] of sources) {
    const template = pickTemplate(jsonGet(json, 'chat_template'), source);
    if (template !== undefined) return { type: 'jinja', file: join(root, source), template };
  }
  return name === undefined ? undefined : { type: 'named', name };
}

/** A template, or the one called 'default' (else the first) of a list of named ones. */
function pickTemplate(value: unknown, source: string): string | undefined {
  if (value === undefined || value === null) return undefined;
  if (typeof value === 'string') return value;
  if (Array.isArray(value)) {
    const named = value.filter(isJsonObject);
    const chosen = named.find((entry) => entry.name === 'default') ?? named[0];
    if (typeof chosen?.template === 'string') return chosen.template;
  }
  throw new TurbomindError(
    'ERR_TM_INVALID_TEMPLATE',
    `${source}: chat_template is neither a string nor a list of { name, template }`,
  );
}
