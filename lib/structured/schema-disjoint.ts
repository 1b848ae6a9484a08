// Whether no value can match two schemas: what makes `oneOf` mean the same as `anyOf`. Says no
// where it cannot tell. Pure functions.
import {
  canonical,
  isSchemaObject,
  type JsonValue,
  type Located,
  type SchemaObject,
} from './schema.js';

export function areDisjoint(a: Located, b: Located): boolean {
  return disjoint(a.schema, b.schema);
}

function disjoint(a: SchemaObject | boolean, b: SchemaObject | boolean): boolean {
  if (a === false || b === false) return true;
  if (a === true || b === true) return false;
  const [typesA, typesB] = [typesOf(a), typesOf(b)];
  if (typesA !== undefined && typesB !== undefined) {
    if (!typesA.some((type) => typesB.includes(type))) return true;
  }
  const [valuesA, valuesB] = [valuesOf(a), valuesOf(b)];
  if (valuesA !== undefined && valuesB !== undefined) {
    return !valuesA.some((value) => valuesB.includes(value));
  }
  return differsInProperty(a, b);
}

// Two objects that both must have a key, with values that cannot be the same.
function differsInProperty(a: SchemaObject, b: SchemaObject): boolean {
  if (!isObjectType(a) || !isObjectType(b)) return false;
  const [ownA, ownB] = [a.properties, b.properties];
  if (!isSchemaObject(ownA) || !isSchemaObject(ownB)) return false;
  return requiredOf(a).some((key) => {
    const [first, second] = [ownA[key], ownB[key]];
    if (!requiredOf(b).includes(key) || first === undefined || second === undefined) return false;
    const areSchemas =
      (isSchemaObject(first) || typeof first === 'boolean') &&
      (isSchemaObject(second) || typeof second === 'boolean');
    return areSchemas && disjoint(first, second);
  });
}

function isObjectType(schema: SchemaObject): boolean {
  return schema.type === 'object' || (schema.type === undefined && schema.properties !== undefined);
}

function requiredOf({ required }: SchemaObject): readonly string[] {
  return Array.isArray(required)
    ? required.filter((key): key is string => typeof key === 'string')
    : [];
}

function typesOf(schema: SchemaObject): readonly JsonValue[] | undefined {
  const values = schema.const !== undefined ? [schema.const] : schema.enum;
  if (Array.isArray(values)) return [...new Set(values.map(typeOfValue))];
  if (schema.type === undefined) return undefined;
  const names = Array.isArray(schema.type) ? schema.type : [schema.type];
  // A whole number is a number as well.
  return names.map((name: JsonValue) => (name === 'integer' ? 'number' : name));
}

function typeOfValue(value: JsonValue): string {
  if (value === null) return 'null';
  return Array.isArray(value) ? 'array' : typeof value;
}

function valuesOf(schema: SchemaObject): readonly string[] | undefined {
  if (schema.const !== undefined) return [canonical(schema.const)];
  return Array.isArray(schema.enum) ? schema.enum.map(canonical) : undefined;
}
