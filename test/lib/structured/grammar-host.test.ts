import { beforeAll, describe, expect, test } from 'vitest';
import { ANY, charSet, complement, utf8Sequences } from '../../../lib/structured/char-set.js';
import { normalizeEbnf } from '../../../lib/structured/ebnf.js';
import { writeGrammar } from '../../../lib/structured/grammar-writer.js';
import {
  choice,
  type Pattern,
  repeat,
  sequence,
  set,
  text,
} from '../../../lib/structured/pattern.js';
import { parseRegex } from '../../../lib/structured/regex.js';
import { readResponseFormat } from '../../../lib/structured/response-format.js';
import { SPECIAL, STOP, TestHost } from './matcher.js';

let host: TestHost;
beforeAll(() => {
  host = new TestHost();
});

const bytesOf = (value: string): Uint8Array => new TextEncoder().encode(value);
const grammarOf = (pattern: Pattern): string => writeGrammar(pattern, new Map());

async function expectTexts(ebnf: string, good: readonly string[], bad: readonly string[]) {
  for (const each of good) expect(await host.accepts(ebnf, bytesOf(each)), each).toBe(true);
  for (const each of bad) expect(await host.accepts(ebnf, bytesOf(each)), each).toBe(false);
}

describe('characters', () => {
  test('every character is spelled as UTF-8, and nothing else is', async () => {
    const ebnf = grammarOf(sequence('<', set(ANY), '>'));
    const points = [0, 0x7f, 0x80, 0x7ff, 0x800, 0xfff, 0x1000, 0xd7ff, 0xe000, 0xffff, 0x10000];
    for (const point of [...points, 0x3ffff, 0x40000, 0xfffff, 0x100000, 0x10ffff]) {
      const bytes = bytesOf(`<${String.fromCodePoint(point)}>`);
      expect(await host.accepts(ebnf, bytes), point.toString(16)).toBe(true);
    }
    const malformed = [
      [0x80],
      [0xc0, 0x80],
      [0xc1, 0xbf],
      [0xe0, 0x80, 0x80],
      [0xed, 0xa0, 0x80],
      [0xf0, 0x80, 0x80, 0x80],
      [0xf4, 0x90, 0x80, 0x80],
      [0xf5, 0x80, 0x80, 0x80],
      [0xff],
    ];
    for (const bytes of malformed) {
      const framed = Uint8Array.from([0x3c, ...bytes, 0x3e]);
      expect(await host.accepts(ebnf, framed), bytes.join()).toBe(false);
    }
  });

  test('ranges that begin and end anywhere', async () => {
    const chars = charSet([
      [0xe0, 0x1ff],
      [0x4e01, 0x9fa5],
      [0x1f600, 0x1f64f],
      [0x61, 0x63],
    ]);
    const ends = chars.flat();
    const inside = (point: number): boolean => chars.some(([a, b]) => a <= point && point <= b);
    for (const [pattern, isIn] of [
      [set(chars), inside],
      [set(complement(chars)), (point: number) => !inside(point)],
    ] as const) {
      for (const point of ends.flatMap((end) => [end - 1, end, end + 1])) {
        const wanted = isIn(point);
        const bytes = bytesOf(String.fromCodePoint(point));
        expect(await host.accepts(grammarOf(pattern), bytes), point.toString(16)).toBe(wanted);
      }
    }
  });

  test('byte sequences are disjoint', () => {
    const all = utf8Sequences(ANY).map((bytes) => JSON.stringify(bytes));
    expect(new Set(all).size).toBe(all.length);
  });
});

// The matcher merges states of one rule too eagerly (xgrammar #632, #911): seen as 250 for 25.
describe('alternatives that begin alike', () => {
  const schemaGrammar = (schema: unknown): string => {
    const source = readResponseFormat({ type: 'json_schema', jsonSchema: { schema } });
    if (source === undefined) throw new Error('no grammar');
    return source.ebnf;
  };

  test('in lists of numbers', async () => {
    const items = { type: 'integer', minimum: 0, maximum: 100, multipleOf: 5 };
    const ebnf = schemaGrammar({ type: 'array', items, maxItems: 4 });
    await expectTexts(
      ebnf,
      ['[]', '[0,5,100]', '[20, 35,85 ,25]'],
      ['[0,250]', '[20,350]', '[5,1000]', '[20, 35 , 85, 250]', '[15,105]'],
    );
  });

  test('in choices of values and what follows them', async () => {
    const anyOf = [{ enum: ['rot', 'rosa'] }, { const: 'ro' }, { enum: ['blau', 'rosarot'] }];
    const ebnf = schemaGrammar({ type: 'array', items: { anyOf }, maxItems: 2 });
    await expectTexts(
      ebnf,
      ['["rot","rosa"]', '["ro","rosarot"]', '["blau"]'],
      ['["rot","rosat"]', '["blaurot"]', '["blaut"]', '["rotrot"]', '["r"]'],
    );
  });

  test('in bytes of characters', async () => {
    const ebnf = grammarOf(choice(text('ä'), text('ö!'), text('Ĥ'), text('ä?')));
    await expectTexts(ebnf, ['ä', 'ö!', 'Ĥ', 'ä?'], ['ö', 'Ķ', 'Ĥ?', 'ä!', 'ö?']);
  });

  test('in loops at the beginning', async () => {
    const ebnf = grammarOf(parseRegex('[ab]*acd'));
    await expectTexts(ebnf, ['acd', 'abacd', 'aacd'], ['cd', 'd', 'bcd', 'acdcd']);
  });
});

describe('repetitions', () => {
  test.each([
    [0, 5],
    [2, 2],
    [0, 70],
    [3, 200],
    [150, 150],
    [140, Number.POSITIVE_INFINITY],
  ])('from %i to %i', async (min, max) => {
    const ebnf = grammarOf(sequence('<', repeat(choice(set('ab'), text('xy')), min, max), '>'));
    const near = [min - 1, min, min + 1, 64, 129, max - 1, max, max + 1];
    for (const count of near.filter((each) => each >= 0 && each < 400)) {
      const wanted = count >= min && count <= max;
      expect(
        await host.accepts(ebnf, bytesOf(`<${'axy'.repeat(count / 2)}${'b'.repeat(count % 2)}>`)),
        `${count}`,
      ).toBe(wanted);
    }
  });

  test('of what may be empty', async () => {
    await expectTexts(grammarOf(parseRegex('(a*b?)*c')), ['c', 'aabbac', 'bc'], ['a', '']);
    await expectTexts(grammarOf(parseRegex('(a?){2,3}')), ['', 'a', 'aaa'], ['aaaa']);
  });
});

describe('sessions', () => {
  test('special tokens are never allowed, the stop token only at the end', async () => {
    const session = await host.open(grammarOf(repeat(set(ANY), 2, 3)));
    expect(host.allowed(session, SPECIAL)).toBe(false);
    expect(host.allowed(session, STOP)).toBe(false);
    await host.send({ type: 'advance', steps: [{ session, tokens: [0x61, 0x62] }] });
    expect(host.allowed(session, STOP)).toBe(true);
    expect(host.allowed(session, 0x63)).toBe(true);
    const posted = await host.send({ type: 'advance', steps: [{ session, tokens: [STOP] }] });
    expect(posted).toEqual([{ type: 'masks', results: [{ session, status: 'ended' }] }]);
  });

  test('more grammars may be in use than are kept', async () => {
    const grammars = Array.from({ length: 40 }, (_, index) => `root ::= "${index} "`);
    const sessions: number[] = [];
    for (const ebnf of grammars) sessions.push(await host.open(ebnf));
    for (const [index, session] of sessions.entries()) {
      expect(host.allowed(session, String(index).charCodeAt(0)), String(index)).toBe(true);
      expect(host.allowed(session, 0x61)).toBe(false);
      await host.send({ type: 'close', session });
    }
    for (const ebnf of grammars)
      expect(await host.accepts(ebnf, bytesOf('7 '))).toBe(ebnf === grammars[7]);
  });

  test('a lost session goes on from its tokens', async () => {
    const ebnf = grammarOf(text('abc'));
    const session = await host.open(ebnf, false, [0x61, 0x62]);
    expect(host.allowed(session, 0x63)).toBe(true);
    expect(host.allowed(session, 0x61)).toBe(false);
  });

  test('a token that is not allowed is told', async () => {
    const session = await host.open(grammarOf(text('abc')));
    const posted = await host.send({ type: 'advance', steps: [{ session, tokens: [0x62] }] });
    expect(posted).toEqual([{ type: 'masks', results: [{ session, status: 'rejected' }] }]);
  });

  test('a grammar that no token can follow is told', async () => {
    const session = await host.open('root ::= "a" [\\xfe\\xff]');
    const posted = await host.send({ type: 'advance', steps: [{ session, tokens: [0x61] }] });
    expect(posted).toEqual([{ type: 'masks', results: [{ session, status: 'stuck' }] }]);
  });

  test('a grammar is compiled once, until many others came after it', async () => {
    const compiles = (): boolean => host.posted.some(({ type }) => type === 'compiling');
    const close = async (session: number): Promise<void> => {
      await host.send({ type: 'close', session });
    };
    const ebnf = grammarOf(text('once'));
    const session = await host.open(ebnf);
    expect(compiles()).toBe(true);
    const other = await host.open(ebnf);
    expect(compiles()).toBe(false);
    await close(session);
    await close(other);
    for (let count = 0; count < 40; count += 1) {
      await close(await host.open(grammarOf(text(`other ${count}`))));
    }
    await host.open(ebnf);
    expect(compiles()).toBe(true);
  });
});

describe('grammars of callers', () => {
  test('are refused with the reason, and hurt nobody', async () => {
    const running = await host.open(grammarOf(text('ab')));
    await host.open('root ::= missing', true);
    const reason = expect.stringContaining('Rule "missing" is not defined');
    expect(host.posted).toEqual([{ type: 'refused', session: expect.any(Number), reason }]);
    await host.send({ type: 'advance', steps: [{ session: running, tokens: [0x61] }] });
    expect(host.allowed(running, 0x62)).toBe(true);
    await host.open('root ::= "fine"', true);
    expect(host.posted.at(-1)).toMatchObject({ type: 'masks', results: [{ status: 'ready' }] });
  });

  test('may name characters of any alphabet', async () => {
    const source = 'root ::= [а-яё]+ " " [^xй\\u4e2d]  # [é]\n';
    const ebnf = normalizeEbnf(source);
    await expectTexts(
      ebnf,
      ['привет y', 'ё é', 'а 国'],
      ['привет x', 'а й', 'а 中', 'abc y', ' y'],
    );
    expect(normalizeEbnf('root ::= [a-z\\n] "[é"')).toBe('root ::= [a-z\\n] "[é"');
    expect(() => normalizeEbnf('root ::= "a\n')).toThrow('line 1: a " without its "');
  });
});

describe('formats', () => {
  test('choices, with quotes and any script', async () => {
    const source = readResponseFormat({
      type: 'choice',
      choices: ['yes', 'a "quote"\n', 'нет ☕'],
    });
    await expectTexts(source?.ebnf ?? '', ['yes', 'a "quote"\n', 'нет ☕'], ['ye', 'yes ', 'no']);
  });

  test('any JSON object', async () => {
    const source = readResponseFormat({ type: 'json_object' });
    const good = [
      '{}',
      '{ "a": [1, -2.5e3, {"b\\n\\u00e9": null}], "ключ": true}',
      '{\n  "a": ""\n}',
    ];
    const bad = ['', '[]', '{"a"}', '{"a":01}', '{"a":"\n"}', '{"a":1,}', '{"a":"\\ud800"}'];
    await expectTexts(source?.ebnf ?? '', good, bad);
  });

  test.each([
    [{ type: 'json' }, 'responseFormat.type: "json" is not known'],
    [{ type: 'json_schem' }, 'did you mean json_schema?'],
    [{ type: 'json_schema', schema: {} }, 'unknown key schema; known keys: type, jsonSchema'],
    [
      { type: 'json_schema', jsonSchema: { type: 'object' } },
      'unknown key type; the schema itself',
    ],
    [{ type: 'json_schema', jsonSchema: { schema: 5 } }, 'expected a JSON schema'],
    [{ type: 'regex_schema', regexSchema: /a/i }, 'the flag i is not supported'],
    [{ type: 'regex_schema', regexSchema: '[]' }, 'matches no text'],
    [{ type: 'choice', choices: [] }, 'a list of 1 to 10000 texts'],
    [{ type: 'grammar', ebnf: '' }, 'a text that is not empty'],
    ['json_object', 'an object with a type'],
  ])('%j is refused', (format, message) => {
    expect(() => readResponseFormat(format)).toThrow(message);
  });

  test('text asks for nothing', () => {
    expect(readResponseFormat({ type: 'text' })).toBeUndefined();
  });
});
