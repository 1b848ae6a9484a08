// JSON arrays: fixed first items, any number of further ones, counts. Pure functions.
import type { ValueCompiler } from './json-schema.js';
import { choice, type Pattern, repeat, sequence } from './pattern.js';
import { isSchemaObject, type Located, located, type SchemaObject, schemaError } from './schema.js';

const MAX_ITEMS = 1000;

export class ArrayCompiler {
  readonly #values: ValueCompiler;

  constructor(values: ValueCompiler) {
    this.#values = values;
  }

  compile(schema: SchemaObject, path: string, depth: number): Pattern {
    const { first, rest } = this.#itemsOf(schema, path);
    const min = countAt(schema, 'minItems', path) ?? 0;
    const max = countAt(schema, 'maxItems', path) ?? Number.POSITIVE_INFINITY;
    if (min > max) throw schemaError(path, `minItems ${min} is above maxItems ${max}`);
    const { uniqueItems } = schema;
    if (uniqueItems !== undefined && uniqueItems !== false && max > 1) {
      throw schemaError(path, 'uniqueItems is not supported; leave it out or use maxItems: 1');
    }
    const fixed = first.slice(0, max).map((each) => this.#values.value(each, depth));
    // More fixed items than needed are all given: a shorter array would be allowed, too.
    const room = rest.schema === false ? 0 : max - fixed.length;
    const needed = Math.max(0, min - fixed.length);
    if (needed > room) throw schemaError(path, `minItems ${min}, but it has ${fixed.length} items`);
    const further = room > 0 ? this.#values.value(rest, depth) : undefined;
    return this.#spell(fixed, further, needed, room);
  }

  #spell(
    fixed: readonly Pattern[],
    further: Pattern | undefined,
    needed: number,
    room: number,
  ): Pattern {
    const { ws } = this.#values;
    const comma = sequence(ws, ',', ws);
    const head = fixed.flatMap((item, index) => (index === 0 ? [item] : [comma, item]));
    const close = sequence(ws, ']');
    if (further === undefined) {
      return head.length === 0 ? sequence('[', close) : sequence('[', ws, ...head, close);
    }
    const more = sequence(comma, further);
    if (head.length > 0) {
      return sequence('[', ws, ...head, repeat(more, needed, room), close);
    }
    const some = sequence(ws, further, repeat(more, Math.max(0, needed - 1), room - 1));
    return needed > 0
      ? sequence('[', some, close)
      : choice(sequence('[', ws, ']'), sequence('[', some, close));
  }

  // Draft 2020's prefixItems and items, or the older items and additionalItems.
  #itemsOf(schema: SchemaObject, path: string): { first: readonly Located[]; rest: Located } {
    const { items, prefixItems, additionalItems } = schema;
    const isOld = Array.isArray(items);
    const list = isOld ? items : prefixItems;
    const key = isOld ? 'items' : 'prefixItems';
    if (list !== undefined && !Array.isArray(list)) {
      throw schemaError(path, 'prefixItems must be a list of schemas');
    }
    if (isOld && prefixItems !== undefined) {
      throw schemaError(path, 'items as a list and prefixItems together; use prefixItems');
    }
    const first = (list ?? []).map((item, index) => located(item, `${path}/${key}/${index}`));
    const open = isOld ? additionalItems : items;
    // With fixed items and nothing said about others, strict means none.
    const isClosed = open === undefined && first.length > 0 && this.#values.isStrict;
    const rest = isClosed ? false : (open ?? true);
    if (typeof rest !== 'boolean' && !isSchemaObject(rest)) {
      throw schemaError(path, 'items must be a schema');
    }
    return {
      first,
      rest: { schema: rest, path: `${path}/${isOld ? 'additionalItems' : 'items'}` },
    };
  }
}

/** A count keyword. */
export function countAt(schema: SchemaObject, key: string, path: string): number | undefined {
  const value = schema[key];
  if (value === undefined) return undefined;
  if (typeof value === 'number' && Number.isInteger(value) && value >= 0 && value <= MAX_ITEMS) {
    return value;
  }
  throw schemaError(path, `${key} must be a whole number from 0 to ${MAX_ITEMS}`);
}
