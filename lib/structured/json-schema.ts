// A JSON schema → the JSON texts it allows. What cannot be promised is refused by path and keyword;
// nothing is ignored that could make an answer invalid. Where a schema leaves things open, a subset
// is chosen: properties in the schema's order, little white space, no keys beyond those named
// unless the schema asks for them. Pure functions.

import { productiveRules } from './grammar-writer.js';
import { ArrayCompiler } from './json-array.js';
import { ObjectCompiler } from './json-object.js';
import {
  choice,
  isProductive,
  type Pattern,
  repeat,
  rule,
  sequence,
  set,
  text,
} from './pattern.js';
import {
  assertionsOf,
  canonical,
  checkKeywords,
  isSchemaObject,
  type JsonValue,
  type Located,
  located,
  resolvePointer,
  type SchemaObject,
  schemaError,
} from './schema.js';
import { areDisjoint } from './schema-disjoint.js';
import { mergeSchemas } from './schema-merge.js';
import { numberPattern } from './schema-numbers.js';
import { isOfType, type JsonType, TYPES, typesOf } from './schema-types.js';
import { stringPattern } from './strings.js';

export interface SchemaGrammar {
  readonly root: Pattern;
  readonly rules: ReadonlyMap<string, Pattern>;
}

const MAX_DEPTH = 100;

/** Space, or a new line with some indentation, or nothing: never so much that it has no end. */
export const SPACE: Pattern = choice(
  text(''),
  text(' '),
  sequence('\n', repeat(set(' \t'), 0, 20)),
);
const WS = rule('ws');
const ANY_VALUE = rule('any');

/**
 * @param isStrict whether objects without additionalProperties have none but the properties named.
 * @throws TurbomindError ERR_TM_INVALID_OPTION naming path, keyword and remedy.
 */
export function compileSchema(schema: unknown, isStrict: boolean): SchemaGrammar {
  const root = located(asJson(schema), '');
  return new SchemaCompiler(root.schema, isStrict).run();
}

/** Any JSON object. */
export function anyObject(): SchemaGrammar {
  return new SchemaCompiler({ type: 'object', additionalProperties: true }, true).run();
}

// What is not JSON (functions, undefined, dates) would be lost silently.
function asJson(value: unknown): JsonValue {
  try {
    const parsed: JsonValue = JSON.parse(JSON.stringify(value) ?? '');
    return parsed;
  } catch {
    throw schemaError('', 'is not JSON; expected an object, true or false');
  }
}

/** What the compilers of arrays and objects need of the one of schemas. */
export interface ValueCompiler {
  readonly isStrict: boolean;
  readonly ws: Pattern;
  value(schema: Located, depth: number): Pattern;
  define(pattern: Pattern): Pattern;
}

export class SchemaCompiler implements ValueCompiler {
  readonly isStrict: boolean;
  readonly ws: Pattern = WS;
  readonly #root: SchemaObject | boolean;
  readonly #rules = new Map<string, Pattern>([['ws', SPACE]]);
  /** Rule of each schema that a $ref names, by pointer. */
  readonly #references = new Map<string, string>();
  readonly #arrays = new ArrayCompiler(this);
  readonly #objects = new ObjectCompiler(this);
  #numRules = 0;

  constructor(root: SchemaObject | boolean, isStrict: boolean) {
    this.#root = root;
    this.isStrict = isStrict;
  }

  run(): SchemaGrammar {
    const root = this.value({ schema: this.#root, path: '' }, 0);
    if (!isProductive(root, productiveRules(this.#rules))) {
      throw schemaError('', 'allows no value that ever ends, or none at all');
    }
    return { root, rules: this.#rules };
  }

  define(pattern: Pattern): Pattern {
    const name = this.#newName();
    this.#rules.set(name, pattern);
    return rule(name);
  }

  #newName(): string {
    this.#numRules += 1;
    return `v${this.#numRules}`;
  }

  /** The JSON texts of a schema. */
  value(at: Located, depth: number): Pattern {
    if (depth > MAX_DEPTH) throw schemaError(at.path, `is nested deeper than ${MAX_DEPTH} levels`);
    if (at.schema === false) return choice();
    if (at.schema === true) return this.#any();
    checkKeywords(at);
    const { schema, path } = at;
    if (schema.$ref !== undefined) return this.#reference(schema, path, depth);
    if (schema.allOf !== undefined) return this.#allOf(schema, path, depth);
    if (schema.anyOf !== undefined) return this.#branches('anyOf', schema, path, depth);
    if (schema.oneOf !== undefined) return this.#branches('oneOf', schema, path, depth);
    if (schema.const !== undefined || schema.enum !== undefined)
      return this.#constants(schema, path);
    const types = typesOf(schema, path);
    if (types === undefined) return this.#any();
    return choice(...types.map((type) => this.#typed(type, { schema, path }, depth)));
  }

  #any(): Pattern {
    if (!this.#rules.has('any')) {
      this.#rules.set('any', choice()); // its parts refer to it
      const open = { additionalProperties: true };
      const types = TYPES.filter((type) => type !== 'integer');
      const parts = types.map((type) => this.#typed(type, { schema: open, path: '' }, 0));
      this.#rules.set('any', choice(...parts));
    }
    return ANY_VALUE;
  }

  // A rule of its own for what a $ref names alone; siblings are merged in.
  #reference(schema: SchemaObject, path: string, depth: number): Pattern {
    const target = resolvePointer(this.#root, schema.$ref ?? '', path);
    const siblings = assertionsOf(schema, ['$ref']);
    if (Object.keys(siblings).length > 0) {
      const merged = mergeSchemas(this.#withoutReference(target), siblings, path);
      return this.value({ schema: merged, path }, depth + 1);
    }
    const known = this.#references.get(target.path);
    if (known !== undefined) {
      if (!this.#rules.has(known) && depth === this.#depthOfReference.get(target.path)) {
        throw schemaError(path, '$ref leads to itself with nothing between');
      }
      return rule(known);
    }
    const name = this.#newName();
    this.#references.set(target.path, name);
    this.#depthOfReference.set(target.path, depth);
    this.#rules.set(name, this.value(target, depth));
    return rule(name);
  }

  readonly #depthOfReference = new Map<string, number>();

  #withoutReference(at: Located): SchemaObject | boolean {
    let target = at;
    for (
      let hops = 0;
      isSchemaObject(target.schema) && target.schema.$ref !== undefined;
      hops += 1
    ) {
      if (hops > MAX_DEPTH) throw schemaError(at.path, '$ref leads to itself with nothing between');
      const next = resolvePointer(this.#root, target.schema.$ref, target.path);
      const siblings = assertionsOf(target.schema, ['$ref']);
      target = { schema: mergeSchemas(next.schema, siblings, target.path), path: next.path };
    }
    checkKeywords(target);
    return target.schema;
  }

  #allOf(schema: SchemaObject, path: string, depth: number): Pattern {
    let merged: SchemaObject | boolean = assertionsOf(schema, ['allOf']);
    for (const [index, part] of listOf(schema.allOf, `${path}/allOf`).entries()) {
      const at = located(part, `${path}/allOf/${index}`);
      checkKeywords(at);
      merged = mergeSchemas(merged, this.#withoutReference(at), path);
    }
    return this.value({ schema: merged, path }, depth + 1);
  }

  #branches(key: 'anyOf' | 'oneOf', schema: SchemaObject, path: string, depth: number): Pattern {
    const rest = assertionsOf(schema, [key]);
    const hasSiblings = Object.keys(rest).length > 0;
    const branches = listOf(schema[key], `${path}/${key}`).map((part, index) => {
      const at = located(part, `${path}/${key}/${index}`);
      checkKeywords(at);
      if (!hasSiblings) return at;
      return { schema: mergeSchemas(this.#withoutReference(at), rest, at.path), path: at.path };
    });
    if (key === 'oneOf') this.#checkDisjoint(branches, path);
    return choice(...branches.map((branch) => this.value(branch, depth)));
  }

  #checkDisjoint(branches: readonly Located[], path: string): void {
    const solid = branches.map((branch) => {
      return { schema: this.#withoutReference(branch), path: branch.path };
    });
    for (const [index, branch] of solid.entries()) {
      const other = solid.slice(0, index).findIndex((earlier) => !areDisjoint(earlier, branch));
      if (other < 0) continue;
      throw schemaError(
        path,
        `oneOf: a value may match the branches ${other} and ${index} both; use anyOf, or give them ` +
          'different types or a required property with different const',
      );
    }
  }

  #constants(schema: SchemaObject, path: string): Pattern {
    const list = schema.enum === undefined ? undefined : listOf(schema.enum, `${path}/enum`);
    const { const: only } = schema;
    const all = only === undefined ? (list ?? []) : [only];
    const others = Object.keys(assertionsOf(schema, ['enum', 'const', 'type']));
    if (others.length > 0) {
      throw schemaError(path, `${others[0]} beside enum or const is not supported; list what fits`);
    }
    const types = schema.type === undefined ? undefined : typesOf(schema, path);
    const fitting = all.filter((value) => {
      const isListed =
        list === undefined || list.some((each) => canonical(each) === canonical(value));
      return isListed && (types === undefined || types.some((type) => isOfType(value, type)));
    });
    if (fitting.length === 0) throw schemaError(path, 'no value of its enum or const fits');
    return choice(...fitting.map((value) => text(JSON.stringify(value))));
  }

  #typed(
    type: JsonType,
    { schema, path }: Located & { schema: SchemaObject },
    depth: number,
  ): Pattern {
    switch (type) {
      case 'null':
        return text('null');
      case 'boolean':
        return choice(text('true'), text('false'));
      case 'string':
        return this.define(stringPattern(schema, path));
      case 'number':
      case 'integer':
        return this.define(numberPattern(type, schema, path));
      case 'array':
        return this.define(this.#arrays.compile(schema, path, depth + 1));
      case 'object':
        return this.define(this.#objects.compile(schema, path, depth + 1));
    }
  }
}

/** The items of a keyword that holds a list with at least one. */
export function listOf(value: JsonValue | undefined, path: string): readonly JsonValue[] {
  if (Array.isArray(value) && value.length > 0) return value;
  throw schemaError(path, 'expected a list with at least one item');
}
