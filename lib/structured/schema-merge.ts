// Two schemas that must both hold → one: what `allOf`, siblings of `$ref` and siblings of `anyOf`
// mean. Exact where it merges; what it cannot merge it refuses by name. Pure functions.
import {
  assertionsOf,
  canonical,
  isSchemaObject,
  type JsonValue,
  type SchemaObject,
  schemaError,
} from './schema.js';

/** @throws TurbomindError ERR_TM_INVALID_OPTION when both speak about the same thing differently. */
export function mergeSchemas(
  a: SchemaObject | boolean,
  b: SchemaObject | boolean,
  path: string,
): SchemaObject | boolean {
  if (a === false || b === false) return false;
  if (a === true) return b;
  if (b === true) return a;
  const [first, second] = [assertionsOf(a), assertionsOf(b)];
  const merged: Record<string, JsonValue> = { ...first };
  for (const [key, value] of Object.entries(second)) {
    const present = first[key];
    if (OBJECT_KEYS.has(key)) continue;
    merged[key] = present === undefined ? value : mergeKeyword(key, present, value, path);
  }
  return { ...merged, ...mergeObjects(first, second, path) };
}

const OBJECT_KEYS: ReadonlySet<string> = new Set([
  'properties',
  'required',
  'additionalProperties',
]);

function mergeKeyword(key: string, a: JsonValue, b: JsonValue, path: string): JsonValue {
  if (canonical(a) === canonical(b)) return a;
  const [low, high] = [Number(a), Number(b)];
  switch (key) {
    case 'minimum':
    case 'exclusiveMinimum':
    case 'minLength':
    case 'minItems':
    case 'minProperties':
      return Math.max(low, high);
    case 'maximum':
    case 'exclusiveMaximum':
    case 'maxLength':
    case 'maxItems':
    case 'maxProperties':
      return Math.min(low, high);
    case 'type':
      return mergeTypes(listOf(a), listOf(b));
    case 'enum':
      return listOf(a).filter((each) =>
        listOf(b).some((its) => canonical(its) === canonical(each)),
      );
    case 'items':
      if (isSchema(a) && isSchema(b)) return mergeSchemas(a, b, `${path}/items`);
      break;
    default:
  }
  throw schemaError(path, `two different ${key} that must both hold are not supported; write one`);
}

function listOf(value: JsonValue): readonly JsonValue[] {
  return Array.isArray(value) ? value : [value];
}

function mergeTypes(a: readonly JsonValue[], b: readonly JsonValue[]): readonly JsonValue[] {
  const narrow = (types: readonly JsonValue[], others: readonly JsonValue[]): JsonValue[] =>
    types.filter(
      (type) => others.includes(type) || (type === 'integer' && others.includes('number')),
    );
  return [...new Set([...narrow(a, b), ...narrow(b, a)])];
}

// A key that one side does not name is still subject to that side's additionalProperties.
function mergeObjects(a: SchemaObject, b: SchemaObject, path: string): SchemaObject {
  if (![...OBJECT_KEYS].some((key) => key in a || key in b)) return {};
  const [ownA, ownB] = [propertiesOf(a), propertiesOf(b)];
  const [restA, restB] = [additionalOf(a), additionalOf(b)];
  const properties: Record<string, JsonValue> = {};
  for (const key of new Set([...Object.keys(ownA), ...Object.keys(ownB)])) {
    const [sideA, sideB] = [ownA[key] ?? restA, ownB[key] ?? restB];
    properties[key] = mergeSchemas(sideA, sideB, `${path}/properties/${key}`);
  }
  const required = [...new Set([...listOf(a.required ?? []), ...listOf(b.required ?? [])])];
  const isOpen = a.additionalProperties === undefined && b.additionalProperties === undefined;
  return {
    properties,
    required,
    ...(isOpen ? {} : { additionalProperties: mergeSchemas(restA, restB, path) }),
  };
}

function propertiesOf(schema: SchemaObject): Record<string, SchemaObject | boolean> {
  const { properties } = schema;
  const entries = isSchemaObject(properties) ? Object.entries(properties) : [];
  return Object.fromEntries(
    entries.filter((entry): entry is [string, SchemaObject] => isSchema(entry[1])),
  );
}

function additionalOf(schema: SchemaObject): SchemaObject | boolean {
  const { additionalProperties } = schema;
  return isSchema(additionalProperties) ? additionalProperties : true;
}

function isSchema(value: JsonValue | undefined): value is SchemaObject | boolean {
  return typeof value === 'boolean' || isSchemaObject(value);
}
