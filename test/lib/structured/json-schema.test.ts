import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { compileSchema } from '../../../lib/structured/json-schema.js';
import { problemsOf } from '../../../scripts/bench/json-schema-checker.mjs';
import { makeRandom, sample } from './patterns.js';

interface Fixture {
  readonly name: string;
  readonly schema: Record<string, unknown>;
}

const url = new URL('../../fixtures/json-schemas.json', import.meta.url);
const fixtures: readonly Fixture[] = JSON.parse(readFileSync(url, 'utf8'));

describe('every text that a schema’s grammar allows is valid', () => {
  test.each(fixtures.map(({ name, schema }) => [name, schema] as const))('%s', (name, schema) => {
    for (const isStrict of [true, false]) {
      const { root, rules } = compileSchema(schema, isStrict);
      const random = makeRandom(name.length * 7919 + 1);
      const texts = new Set<string>();
      for (let round = 0; round < 60; round += 1) {
        const text = sample(root, random, rules);
        texts.add(text);
        expect(problemsOf(schema, JSON.parse(text)), text).toEqual([]);
      }
      expect(texts.size).toBeGreaterThan(1);
    }
  });
});

describe('what cannot be promised is refused by path', () => {
  test.each<[string, unknown, RegExp]>([
    ['an unknown type', { type: 'foo' }, /type "foo"; expected object/],
    [
      'a typo',
      { type: 'object', requried: ['a'] },
      /unknown keyword requried; did you mean required/,
    ],
    [
      'not',
      { properties: { a: { not: { type: 'null' } } } },
      /at \/properties\/a: not is not supp/,
    ],
    ['conditions', { if: true, else: false }, /if is not supported; use anyOf/],
    ['contains', { type: 'array', contains: { const: 1 } }, /contains is not supported/],
    ['uniqueItems', { type: 'array', uniqueItems: true }, /uniqueItems is not supported/],
    ['nullable', { type: 'string', nullable: true }, /nullable is not supported; use type/],
    ['an unknown format', { type: 'string', format: 'phone' }, /format "phone" is not supported/],
    [
      'look-ahead',
      { type: 'string', pattern: '(?=a)b' },
      /pattern "\(\?=a\)b" at position 2: look/,
    ],
    ['a pattern that nothing matches', { type: 'string', pattern: '[]' }, /allows no value/],
    ['pattern against length', { pattern: '^a+$', maxLength: 3 }, /bound the repetitions/],
    ['bounds the wrong way round', { type: 'integer', minimum: 5, maximum: 3 }, /no number lies/],
    ['no whole number between', { type: 'integer', minimum: 0.1, maximum: 0.9 }, /no number lies/],
    ['odd multiples', { type: 'number', multipleOf: 0.3 }, /multipleOf 0.3 is supported for/],
    ['a reference outwards', { $ref: 'http://x/y' }, /leads out of the schema/],
    ['a reference to nothing', { $ref: '#/$defs/no' }, /names nothing/],
    ['a reference to itself', { $ref: '#' }, /leads to itself with nothing between/],
    ['a type without an end', { properties: { a: { $ref: '#' } }, required: ['a'] }, /ever ends/],
    ['overlapping oneOf', { oneOf: [{ type: 'integer' }, { type: 'number' }] }, /branches 0 and 1/],
    ['false', false, /allows no value/],
    ['required and forbidden', { properties: { a: false }, required: ['a'] }, /allows no value/],
    ['enum beside others', { enum: ['a'], minLength: 1 }, /minLength beside enum/],
    ['enum of another type', { type: 'integer', enum: ['a'] }, /no value of its enum/],
    [
      'two patterns that must both hold',
      { allOf: [{ pattern: 'a' }, { pattern: 'b' }] },
      /two diff/,
    ],
    [
      'minProperties of free keys',
      { minProperties: 3, additionalProperties: true },
      /minProperties/,
    ],
    ['a malformed keyword', { type: 'object', required: 'a' }, /required must be a list/],
    ['no schema', { properties: { a: 5 } }, /at \/properties\/a: expected a schema/],
  ])('%s', (_, schema, message) => {
    expect(() => compileSchema(schema, true)).toThrow(message);
    expect(() => compileSchema(schema, true)).toThrow(
      expect.objectContaining({ code: 'ERR_TM_INVALID_OPTION' }),
    );
  });

  test('nesting without end', () => {
    let schema: unknown = { type: 'null' };
    for (let depth = 0; depth < 200; depth += 1) schema = { type: 'array', items: schema };
    expect(() => compileSchema(schema, true)).toThrow(/nested deeper than 100/);
  });
});

describe('strict', () => {
  const schema = { type: 'object', properties: { a: { type: 'boolean' } }, required: ['a'] };
  const keysOf = (isStrict: boolean): Set<string> => {
    const { root, rules } = compileSchema(schema, isStrict);
    const random = makeRandom(5);
    const keys = new Set<string>();
    for (let round = 0; round < 100; round += 1) {
      for (const key of Object.keys(JSON.parse(sample(root, random, rules)))) keys.add(key);
    }
    return keys;
  };

  test('means no other keys', () => expect([...keysOf(true)]).toEqual(['a']));
  test('not strict: other keys, never a named one again', () => {
    expect(keysOf(false).size).toBeGreaterThan(5);
  });
});
