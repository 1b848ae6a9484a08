// JSON objects: named properties in the schema's order, optional ones left out or given, then keys
// that are not named where the schema has a place for them. Pure functions.
import { ANY, type CharSet, charsOf, intersect, without } from './char-set.js';
import { countAt } from './json-array.js';
import type { ValueCompiler } from './json-schema.js';
import {
  asJsonString,
  choice,
  EMPTY,
  JSON_CHAR,
  JSON_SAFE,
  type Pattern,
  repeat,
  sequence,
  set,
  text,
} from './pattern.js';
import { isSchemaObject, type Located, located, type SchemaObject, schemaError } from './schema.js';
import { patternAt, stringPattern } from './strings.js';

interface Property {
  readonly key: string;
  readonly value: Pattern;
  readonly isRequired: boolean;
}

/** Further entries: how a key is spelled, quotes counted, and what stands behind it. */
interface Further {
  readonly key: Pattern;
  readonly value: Pattern;
}

export class ObjectCompiler {
  readonly #values: ValueCompiler;

  constructor(values: ValueCompiler) {
    this.#values = values;
  }

  compile(schema: SchemaObject, path: string, depth: number): Pattern {
    const properties = this.#propertiesOf(schema, path, depth);
    const further = this.#furtherOf(schema, properties, path, depth);
    const { min, max } = this.#counts(schema, properties, further, path);
    return this.#spell(properties, further, min, max);
  }

  #propertiesOf(schema: SchemaObject, path: string, depth: number): Property[] {
    const { properties = {}, required = [], additionalProperties } = schema;
    if (!isSchemaObject(properties)) throw schemaError(path, 'properties must be an object');
    if (!Array.isArray(required) || required.some((key) => typeof key !== 'string')) {
      throw schemaError(path, 'required must be a list of texts');
    }
    // Keys that are required but described nowhere follow the rule for all others.
    const rest = additionalProperties ?? true;
    const undescribed = required.filter((key) => !Object.hasOwn(properties, String(key)));
    const all = [
      ...Object.entries(properties),
      ...undescribed.map((key) => [String(key), rest] as const),
    ];
    return all.flatMap(([key, value]) => {
      const at = located(value, `${path}/properties/${key}`);
      const isRequired = required.includes(key);
      if (at.schema === false && !isRequired) return [];
      return [{ key, value: this.#values.value(at, depth), isRequired }];
    });
  }

  #furtherOf(
    schema: SchemaObject,
    properties: readonly Property[],
    path: string,
    depth: number,
  ): Further | undefined {
    const { additionalProperties, patternProperties } = schema;
    if (patternProperties !== undefined) {
      return this.#patternEntries(schema, properties, path, depth);
    }
    const isOpen = additionalProperties === undefined && !this.#values.isStrict;
    const value = isOpen || additionalProperties === undefined ? isOpen : additionalProperties;
    if (value === false) return undefined;
    const at = located(value, `${path}/additionalProperties`);
    const key = this.#furtherKey(schema, properties, path);
    return { key, value: this.#values.value(at, depth) };
  }

  #furtherKey(schema: SchemaObject, properties: readonly Property[], path: string): Pattern {
    const { propertyNames } = schema;
    const names = properties.map(({ key }) => key);
    if (propertyNames === undefined) return sequence('"', keysExcept(names), '"');
    const at = located(propertyNames, `${path}/propertyNames`);
    if (names.length > 0) {
      throw schemaError(path, 'propertyNames beside properties is not supported; name them all');
    }
    if (typeof at.schema === 'boolean') {
      return at.schema ? sequence('"', keysExcept([]), '"') : choice();
    }
    const { enum: list } = at.schema;
    if (Array.isArray(list))
      return choice(...list.map((name) => text(JSON.stringify(String(name)))));
    return stringPattern(at.schema, at.path);
  }

  #patternEntries(
    schema: SchemaObject,
    properties: readonly Property[],
    path: string,
    depth: number,
  ): Further | undefined {
    const { patternProperties, additionalProperties, propertyNames } = schema;
    if (!isSchemaObject(patternProperties)) {
      throw schemaError(path, 'patternProperties must be an object');
    }
    const [entry, ...others] = Object.entries(patternProperties);
    if (entry === undefined) return undefined;
    const isOpen = additionalProperties !== undefined && additionalProperties !== false;
    if (others.length > 0 || isOpen || propertyNames !== undefined) {
      throw schemaError(
        path,
        'patternProperties is supported with one pattern, additionalProperties: false and no ' +
          'propertyNames',
      );
    }
    const [pattern, value] = entry;
    const at: Located = located(value, `${path}/patternProperties/${pattern}`);
    const content = patternAt(pattern, at.path);
    const matched = properties.find(({ key }) => new RegExp(pattern, 'u').test(key));
    if (matched !== undefined) {
      throw schemaError(at.path, `also matches the property ${JSON.stringify(matched.key)}`);
    }
    const key = sequence('"', asJsonString(content), '"');
    return { key, value: this.#values.value(at, depth) };
  }

  // How many further entries there may be. Keys may repeat, so only so much can be promised.
  #counts(
    schema: SchemaObject,
    properties: readonly Property[],
    further: Further | undefined,
    path: string,
  ): { readonly min: number; readonly max: number } {
    const min = countAt(schema, 'minProperties', path) ?? 0;
    const max = countAt(schema, 'maxProperties', path) ?? Number.POSITIVE_INFINITY;
    const numRequired = properties.filter(({ isRequired }) => isRequired).length;
    const numOptional = properties.length - numRequired;
    if (numRequired > max) throw schemaError(path, `more than maxProperties ${max} are required`);
    const missing = Math.max(0, min - numRequired);
    const isSure = missing === 0 || (missing === 1 && further !== undefined && numOptional === 0);
    const fits = properties.length <= max && (further === undefined || numOptional === 0);
    if (!isSure || (max !== Number.POSITIVE_INFINITY && !fits)) {
      throw schemaError(
        path,
        'minProperties and maxProperties are not supported here; name the properties and make the ' +
          'ones that are needed required',
      );
    }
    return { min: missing, max: max - properties.length };
  }

  // A chain: at each property, either it or the next; `isFirst` tells whether a comma comes before.
  #spell(
    properties: readonly Property[],
    further: Further | undefined,
    min: number,
    max: number,
  ): Pattern {
    const { ws } = this.#values;
    const close = sequence(ws, '}');
    const comma = sequence(ws, ',', ws);
    const entry = (key: Pattern, value: Pattern): Pattern => sequence(key, ws, ':', ws, value);
    let first: Pattern = close;
    let later: Pattern = close;
    if (further !== undefined && max > 0) {
      const one = entry(further.key, further.value);
      const more = repeat(sequence(comma, one), Math.max(0, min - 1), max - 1);
      const some = sequence(ws, one, more, close);
      first = this.#values.define(min > 0 ? some : choice(close, some));
      later = this.#values.define(sequence(repeat(sequence(comma, one), min, max), close));
    }
    for (const { key, value, isRequired } of [...properties].reverse()) {
      const item = entry(text(JSON.stringify(key)), value);
      const [asFirst, asLater] = [sequence(ws, item, later), sequence(comma, item, later)];
      const skipped = { first, later };
      first = this.#values.define(isRequired ? asFirst : choice(asFirst, skipped.first));
      later = this.#values.define(isRequired ? asLater : choice(asLater, skipped.later));
    }
    return sequence('{', first);
  }
}

/** Unescaped keys that are none of these: a walk down the tree of their letters. */
function keysExcept(names: readonly string[]): Pattern {
  if (names.length === 0) return repeat(JSON_CHAR, 0, Number.POSITIVE_INFINITY);
  const plain: CharSet = intersect(ANY, JSON_SAFE);
  const anything = repeat(set(plain), 0, Number.POSITIVE_INFINITY);
  const walk = (rests: readonly (readonly string[])[]): Pattern => {
    const isTaken = rests.some((rest) => rest.length === 0);
    const open = rests.filter((rest) => rest.length > 0);
    const letters = [...new Set(open.map(([letter]) => letter ?? ''))];
    const branches = letters.map((letter) => {
      const below = open.filter((rest) => rest[0] === letter).map((rest) => rest.slice(1));
      return sequence(set(intersect(charsOf(letter), plain)), walk(below));
    });
    const other = sequence(set(without(plain, charsOf(letters.join('')))), anything);
    return choice(...(isTaken ? [] : [EMPTY]), other, ...branches);
  };
  return walk(names.map((name) => [...name]));
}
