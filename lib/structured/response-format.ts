// The responseFormat option: what shapes an answer can be held to, checked and turned into the
// grammar that the matcher compiles. Refusals happen here, before anything is submitted. Pure
// functions; the grammar of a schema is kept for as long as it is used often.
import { invalidOption, nearestName } from '../check.js';
import { isJsonObject } from '../checkpoint/json.js';
import { TurbomindError } from '../errors.js';
import { EbnfError, normalizeEbnf } from './ebnf.js';
import { writeGrammar } from './grammar-writer.js';
import { anyObject, compileSchema, type SchemaGrammar } from './json-schema.js';
import { choice, isProductive, type Pattern, text } from './pattern.js';
import { parseRegex } from './regex.js';

/** The shape an answer is held to: every token that would leave it is left out of the draw. */
export type ResponseFormat =
  /** No shape: as without the option. */
  | { readonly type: 'text' }
  /** Any JSON object. */
  | { readonly type: 'json_object' }
  /** JSON that is valid under a schema (draft 2020-12; docs/api.md lists the keywords). */
  | { readonly type: 'json_schema'; readonly jsonSchema: JsonSchemaFormat }
  /** A text that matches a regular expression as a whole. */
  | { readonly type: 'regex_schema'; readonly regexSchema: string | RegExp }
  /** A text of a grammar in EBNF (GBNF's notation), from its rule `root`. */
  | { readonly type: 'grammar'; readonly ebnf: string }
  /** One of some texts. */
  | { readonly type: 'choice'; readonly choices: readonly string[] };

/** A JSON schema, as OpenAI and LMDeploy take it. */
export interface JsonSchemaFormat {
  /** For the reader, as `description` is: the model sees neither. */
  readonly name?: string | undefined;
  readonly description?: string | undefined;
  readonly schema: boolean | Readonly<Record<string, unknown>>;
  /**
   * true: objects have no keys but those the schema names, unless it says additionalProperties.
   * false: they may have others, as JSON schema's own default is. Defaults to true.
   */
  readonly strict?: boolean | undefined;
}

/** A grammar to compile. */
export interface GrammarSource {
  /** The grammar's text; equal texts are the same grammar. */
  readonly ebnf: string;
  /** Whether a caller wrote it: then its mistakes are the caller's. */
  readonly isForeign: boolean;
}

const KEYS = {
  text: [],
  json_object: [],
  json_schema: ['jsonSchema'],
  regex_schema: ['regexSchema'],
  grammar: ['ebnf'],
  choice: ['choices'],
} as const satisfies Record<ResponseFormat['type'], readonly string[]>;

/** Characters of a regular expression, a grammar or a choice; schemas may be longer. */
const MAX_CHARS = 2 ** 20;
const MAX_CHOICES = 10_000;
const MOST_KEPT = 64;

const kept = new Map<string, GrammarSource>();

/**
 * The grammar of a format; undefined when it asks for nothing.
 * @throws TurbomindError ERR_TM_INVALID_OPTION
 */
export function readResponseFormat(format: unknown): GrammarSource | undefined {
  const checked = checkFormat(format);
  if (checked.type === 'text') return undefined;
  const key = keyOf(checked);
  const known = kept.get(key);
  if (known !== undefined) kept.delete(key); // comes back as the last used
  const source = known ?? compile(checked);
  kept.set(key, source);
  for (const oldest of kept.keys()) {
    if (kept.size <= MOST_KEPT) break;
    kept.delete(oldest);
  }
  return source;
}

function keyOf(format: ResponseFormat): string {
  if (format.type !== 'regex_schema') return stringify(format);
  return `regex_schema ${sourceOf(format.regexSchema)}`;
}

function stringify(value: unknown): string {
  try {
    return JSON.stringify(value) ?? '';
  } catch (error) {
    const reason = error instanceof Error ? error.message.split('\n', 1)[0] : String(error);
    throw refused(`responseFormat: is not JSON: ${reason}`);
  }
}

function checkFormat(format: unknown): ResponseFormat {
  if (!isJsonObject(format)) throw invalidOption('responseFormat', format, 'an object with a type');
  const { type } = format;
  if (!isType(type)) {
    const expected = Object.keys(KEYS).join(', ');
    const nearest = typeof type === 'string' ? nearestName(type, Object.keys(KEYS)) : undefined;
    const hint = nearest === undefined ? `expected ${expected}` : `did you mean ${nearest}?`;
    throw refused(`responseFormat.type: ${stringify(type)} is not known; ${hint}`);
  }
  const known: readonly string[] = ['type', ...KEYS[type]];
  for (const key of Object.keys(format)) {
    if (!known.includes(key))
      throw refused(`responseFormat: unknown key ${key}; ${hintFor(key, known)}`);
  }
  switch (type) {
    case 'text':
    case 'json_object':
      return { type };
    case 'json_schema':
      return { type, jsonSchema: checkSchemaFormat(format.jsonSchema) };
    case 'regex_schema':
      return { type, regexSchema: checkText(sourceOf(format.regexSchema), 'regexSchema') };
    case 'grammar':
      return { type, ebnf: checkText(format.ebnf, 'ebnf') };
    case 'choice':
      return { type, choices: checkChoices(format.choices) };
  }
}

function hintFor(key: string, known: readonly string[]): string {
  const nearest = nearestName(key, known);
  return nearest === undefined ? `known keys: ${known.join(', ')}` : `did you mean ${nearest}?`;
}

function checkSchemaFormat(value: unknown): JsonSchemaFormat {
  if (!isJsonObject(value)) {
    throw invalidOption(
      'responseFormat.jsonSchema',
      value,
      'an object { name?, description?, schema, strict? }',
    );
  }
  const known = ['name', 'description', 'schema', 'strict'];
  for (const key of Object.keys(value)) {
    if (known.includes(key)) continue;
    throw refused(
      `responseFormat.jsonSchema: unknown key ${key}; the schema itself stands under schema`,
    );
  }
  const { schema, strict } = value;
  for (const key of ['name', 'description']) {
    if (value[key] === undefined || typeof value[key] === 'string') continue;
    throw invalidOption(`responseFormat.jsonSchema.${key}`, value[key], 'a text');
  }
  if (strict !== undefined && typeof strict !== 'boolean') {
    throw invalidOption('responseFormat.jsonSchema.strict', strict, 'true or false');
  }
  if (!isJsonObject(schema) && typeof schema !== 'boolean') {
    throw invalidOption('responseFormat.jsonSchema.schema', schema, 'a JSON schema');
  }
  return { schema, strict };
}

function checkText(value: unknown, key: string): string {
  if (typeof value !== 'string' || value === '') {
    throw invalidOption(`responseFormat.${key}`, value, 'a text that is not empty');
  }
  if (value.length <= MAX_CHARS) return value;
  throw refused(`responseFormat.${key}: ${value.length} characters; the limit is ${MAX_CHARS}`);
}

function checkChoices(value: unknown): readonly string[] {
  const isList = Array.isArray(value) && value.length > 0 && value.length <= MAX_CHOICES;
  if (!isList || value.some((each) => typeof each !== 'string' || each === '')) {
    const expected = `a list of 1 to ${MAX_CHOICES} texts that are not empty`;
    throw invalidOption('responseFormat.choices', value, expected);
  }
  return value.map(String);
}

function sourceOf(regex: unknown): unknown {
  if (!(regex instanceof RegExp)) return regex;
  const unsupported = regex.flags.replace(/[uv]/g, '');
  if (unsupported === '') return regex.source;
  throw refused(`responseFormat.regexSchema: the flag ${unsupported} is not supported`);
}

function compile(format: Exclude<ResponseFormat, { readonly type: 'text' }>): GrammarSource {
  switch (format.type) {
    case 'json_object':
      return write(anyObject(), 'the JSON object');
    case 'json_schema': {
      const { schema, strict } = format.jsonSchema;
      return write(compileSchema(schema, strict ?? true), 'jsonSchema.schema');
    }
    case 'regex_schema':
      return write(
        { root: regexPattern(String(format.regexSchema)), rules: new Map() },
        'regexSchema',
      );
    case 'choice':
      return write({ root: choice(...format.choices.map(text)), rules: new Map() }, 'choices');
    case 'grammar':
      return { ebnf: foreign(format.ebnf), isForeign: true };
  }
}

function regexPattern(source: string): Pattern {
  try {
    const pattern = parseRegex(source);
    if (isProductive(pattern, new Set())) return pattern;
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw refused(`responseFormat.regexSchema: ${JSON.stringify(source)} ${reason}`);
  }
  throw refused(`responseFormat.regexSchema: ${JSON.stringify(source)} matches no text`);
}

function foreign(ebnf: string): string {
  try {
    return normalizeEbnf(ebnf);
  } catch (error) {
    if (!(error instanceof EbnfError)) throw error;
    throw refused(`responseFormat.ebnf: ${error.message}`);
  }
}

function write({ root, rules }: SchemaGrammar, what: string): GrammarSource {
  try {
    return { ebnf: writeGrammar(root, rules), isForeign: false };
  } catch (error) {
    // Nesting by the thousand ends in one, too.
    if (!(error instanceof RangeError)) throw error;
    throw refused(
      `responseFormat.${what}: its grammar is too large; lower its lengths and repetitions`,
    );
  }
}

function refused(message: string): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_OPTION', message);
}

function isType(value: unknown): value is ResponseFormat['type'] {
  return typeof value === 'string' && Object.hasOwn(KEYS, value);
}
