// The types that a schema names or means. Pure functions.
import {
  isSchemaObject,
  type JsonValue,
  KEYWORDS,
  type SchemaObject,
  schemaError,
} from './schema.js';

export const TYPES = ['object', 'array', 'string', 'number', 'integer', 'boolean', 'null'] as const;
export type JsonType = (typeof TYPES)[number];

/**
 * Undefined: all.
 * @throws TurbomindError ERR_TM_INVALID_OPTION for a name that is no type.
 */
export function typesOf(schema: SchemaObject, path: string): readonly JsonType[] | undefined {
  if (schema.type === undefined) return inferTypes(schema);
  const names = Array.isArray(schema.type) ? schema.type : [schema.type];
  return names.map((name: JsonValue) => {
    const type = TYPES.find((known) => known === name);
    if (type !== undefined) return type;
    throw schemaError(path, `type ${JSON.stringify(name)}; expected ${TYPES.join(', ')}`);
  });
}

// A schema that speaks of one kind of value and names no type means that kind: a subset of what it
// allows. One that says nothing allows everything.
function inferTypes(schema: SchemaObject): readonly JsonType[] | undefined {
  const types = (['object', 'array', 'string', 'number'] as const).filter((type) =>
    KEYWORDS[type].some((key) => schema[key] !== undefined),
  );
  return types.length === 0 ? undefined : types;
}

export function isOfType(value: JsonValue, type: JsonType): boolean {
  if (type === 'null') return value === null;
  if (type === 'array') return Array.isArray(value);
  if (type === 'integer') return typeof value === 'number' && Number.isInteger(value);
  if (type === 'object') return isSchemaObject(value);
  return typeof value === type;
}
