// What a JSON schema says, checked keyword by keyword: types of values, unknown and unsupported
// keywords refused by path, references followed, `allOf` and siblings merged into one. What JSON
// text it allows is json-schema.ts's. Pure functions.
import { nearestName } from '../check.js';
import { TurbomindError } from '../errors.js';

export type JsonValue =
  | null
  | boolean
  | number
  | string
  | readonly JsonValue[]
  | { readonly [key: string]: JsonValue };
export type SchemaObject = { readonly [key: string]: JsonValue };

/** A schema and where it stands, for messages. */
export interface Located {
  readonly schema: SchemaObject | boolean;
  /** '' for the root, '/properties/name' below. */
  readonly path: string;
}

/** Says something about a schema without a limit on its values. */
const ANNOTATIONS: ReadonlySet<string> = new Set([
  '$schema',
  '$id',
  '$comment',
  '$anchor',
  '$defs',
  'definitions',
  'title',
  'description',
  'default',
  'example',
  'examples',
  'deprecated',
  'readOnly',
  'writeOnly',
]);

/** Keywords that mean something here, by the type of value they speak about. */
export const KEYWORDS = {
  any: ['type', 'enum', 'const', '$ref', 'anyOf', 'oneOf', 'allOf'],
  string: ['minLength', 'maxLength', 'pattern', 'format'],
  number: ['minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum', 'multipleOf'],
  array: ['items', 'prefixItems', 'additionalItems', 'minItems', 'maxItems', 'uniqueItems'],
  object: [
    'properties',
    'required',
    'additionalProperties',
    'patternProperties',
    'propertyNames',
    'minProperties',
    'maxProperties',
  ],
} as const;

/** Known, and refused with the way around them. */
const UNSUPPORTED: ReadonlyMap<string, string> = new Map([
  ['not', 'say what is allowed instead'],
  ['if', 'use anyOf with one branch for each case'],
  ['then', 'use anyOf with one branch for each case'],
  ['else', 'use anyOf with one branch for each case'],
  ['dependentRequired', 'use anyOf with one branch for each case'],
  ['dependentSchemas', 'use anyOf with one branch for each case'],
  ['dependencies', 'use anyOf with one branch for each case'],
  ['contains', 'use prefixItems, or items'],
  ['minContains', 'use prefixItems, or items'],
  ['maxContains', 'use prefixItems, or items'],
  ['$dynamicRef', 'use $ref'],
  ['$recursiveRef', 'use $ref'],
  ['nullable', "use type: ['string', 'null'] or anyOf"],
  ['contentEncoding', 'use pattern'],
  ['contentMediaType', 'leave it out'],
]);

const KNOWN: readonly string[] = Object.values(KEYWORDS).flat();

export function schemaError(path: string, problem: string): TurbomindError {
  const where = path === '' ? '' : ` at ${path}`;
  return new TurbomindError(
    'ERR_TM_INVALID_OPTION',
    `responseFormat.jsonSchema.schema${where}: ${problem}`,
  );
}

export function isSchemaObject(value: unknown): value is SchemaObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** A schema below another one. */
export function located(value: JsonValue | undefined, path: string): Located {
  if (typeof value === 'boolean' || isSchemaObject(value)) return { schema: value, path };
  throw schemaError(path, 'expected a schema: an object, true or false');
}

/** Refuses keywords that are unknown, or known and not supported. */
export function checkKeywords({ schema, path }: Located): void {
  if (typeof schema === 'boolean') return;
  for (const [key, value] of Object.entries(schema)) {
    if (KNOWN.includes(key) || ANNOTATIONS.has(key) || key.startsWith('x-')) continue;
    const isHarmless = key === 'unevaluatedProperties' || key === 'unevaluatedItems';
    if (isHarmless && typeof value === 'boolean') continue;
    const remedy = UNSUPPORTED.get(key);
    if (remedy !== undefined) throw schemaError(path, `${key} is not supported; ${remedy}`);
    const nearest = nearestName(key, KNOWN);
    const hint = nearest === undefined ? 'leave it out' : `did you mean ${nearest}?`;
    throw schemaError(path, `unknown keyword ${key}; ${hint}`);
  }
}

/** The schema that a JSON pointer of this document names. */
export function resolvePointer(
  root: SchemaObject | boolean,
  ref: JsonValue,
  path: string,
): Located {
  if (typeof ref !== 'string') throw schemaError(path, '$ref must be a text');
  if (ref !== '#' && !ref.startsWith('#/')) {
    throw schemaError(path, `$ref ${JSON.stringify(ref)} leads out of the schema; expected '#/…'`);
  }
  let value: JsonValue | undefined = root;
  for (const part of ref.split('/').slice(1)) {
    const key = decodePart(part, path);
    if (Array.isArray(value)) value = value[Number(key)];
    else if (isSchemaObject(value) && Object.hasOwn(value, key)) value = value[key];
    else value = undefined;
    if (value === undefined) throw schemaError(path, `$ref ${JSON.stringify(ref)} names nothing`);
  }
  return located(value, ref.slice(1));
}

function decodePart(part: string, path: string): string {
  try {
    return decodeURIComponent(part).replaceAll('~1', '/').replaceAll('~0', '~');
  } catch {
    throw schemaError(path, `$ref has a malformed part ${JSON.stringify(part)}`);
  }
}

/** A copy less annotations and the keys given. */
export function assertionsOf(schema: SchemaObject, except: readonly string[] = []): SchemaObject {
  return Object.fromEntries(
    Object.entries(schema).filter(([key]) => {
      return !ANNOTATIONS.has(key) && !key.startsWith('x-') && !except.includes(key);
    }),
  );
}

/** JSON values as texts that are equal when the values are. */
export function canonical(value: JsonValue): string {
  if (Array.isArray(value)) return `[${value.map(canonical).join(',')}]`;
  if (isSchemaObject(value)) {
    const keys = Object.keys(value).sort();
    return `{${keys.map((key) => `${JSON.stringify(key)}:${canonical(value[key] ?? null)}`).join(',')}}`;
  }
  return JSON.stringify(value);
}
