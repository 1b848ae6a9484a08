// responseFormat on the real engine, the embedded model and the real grammar worker.
import { mkdtempSync, readdirSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { TurbomindError } from '../../lib/errors.js';
import { pipeline } from '../../lib/open-pipeline.js';
import type { Pipeline } from '../../lib/pipeline.js';
import { problemsOf } from '../../scripts/bench/json-schema-checker.mjs';
import { embedded, runModule } from './support/paths.js';

const PROMPT = 'What is 37 + 45?';
const SCHEMA = {
  type: 'object',
  properties: {
    name: { type: 'string', maxLength: 8 },
    steps: {
      type: 'array',
      minItems: 1,
      maxItems: 3,
      items: { type: 'integer', minimum: 0, maximum: 100, multipleOf: 5 },
    },
  },
  required: ['name', 'steps'],
} as const;
const json = { type: 'json_schema', jsonSchema: { schema: SCHEMA } } as const;
const sampled = { doSample: true, temperature: 1, topK: 0, maxNewTokens: 400 } as const;
// Up to three pairs of brackets: a random sampler ends every answer.
const NESTED = `root ::= [xy] [xy] | "(" a ")"
a ::= [xy] [xy] | "(" b ")"
b ::= [xy] [xy] | "(" [xy] [xy] ")"`;
let pipe: Pipeline;

beforeAll(async () => {
  pipe = await pipeline(embedded, { device: 'cpu' });
});
afterAll(() => pipe?.close());

describe('every format keeps its promise whatever is drawn', () => {
  test('JSON schemas', async () => {
    const seeds = Array.from({ length: 8 }, (_, randomSeed) => randomSeed);
    const settings = seeds.map((randomSeed) => ({ ...sampled, randomSeed, responseFormat: json }));
    const responses = await pipe(
      seeds.map(() => PROMPT),
      settings,
    );
    for (const { text, finishReason } of responses) {
      expect(finishReason).toBe('stop');
      expect(problemsOf(SCHEMA, JSON.parse(text)), text).toEqual([]);
    }
    expect(new Set(responses.map(({ text }) => text)).size).toBeGreaterThan(1);
  });

  test('expressions, choices and grammars', async () => {
    const responses = await pipe(
      [PROMPT, PROMPT, PROMPT],
      [
        {
          ...sampled,
          responseFormat: { type: 'regex_schema', regexSchema: '[a-c]{2,4}-\\d{1,6}x' },
        },
        { ...sampled, responseFormat: { type: 'choice', choices: ['yes', 'yesterday', 'no'] } },
        {
          ...sampled,
          responseFormat: { type: 'grammar', ebnf: NESTED },
        },
      ],
    );
    const [regex, choice, grammar] = responses.map(({ text }) => text);
    for (const { finishReason } of responses) expect(finishReason).toBe('stop');
    expect(regex).toMatch(/^[a-c]{2,4}-\d{1,6}x$/);
    expect(['yes', 'yesterday', 'no']).toContain(choice);
    expect(grammar).toMatch(/^(\(*)[xy][xy](\)*)$/);
    expect(grammar?.split('(').length).toBe(grammar?.split(')').length);
  });
});

test('streams give the same answer in parts', async () => {
  const options = { ...sampled, randomSeed: 3, responseFormat: json };
  const whole = await pipe(PROMPT, options);
  let text = '';
  let parts = 0;
  for await (const part of pipe.stream(PROMPT, options)) {
    text += part.text;
    parts += 1;
  }
  expect(text).toBe(whole.text);
  expect(parts).toBeGreaterThan(2);
});

test('a free request beside guided ones draws the same tokens as alone', async () => {
  const free = { ...sampled, maxNewTokens: 24, ignoreEos: true, randomSeed: 11 };
  const alone = await pipe(PROMPT, free);
  const guided = { ...sampled, randomSeed: 5, responseFormat: json };
  const [, beside] = await pipe(['Hello!', PROMPT, 'Hello!'], [guided, free, guided]);
  expect(beside?.tokenIds).toEqual(alone.tokenIds);
});

test('what cannot be promised is refused with its reason', async () => {
  const schema = { type: 'object', properties: { a: { type: 'array', uniqueItems: true } } };
  const refused = pipe(PROMPT, { responseFormat: { type: 'json_schema', jsonSchema: { schema } } });
  await expect(refused).rejects.toThrow(TurbomindError);
  await expect(refused).rejects.toMatchObject({
    code: 'ERR_TM_INVALID_OPTION',
    message: expect.stringMatching(/\/properties\/a.*uniqueItems is not supported/),
  });
  const malformed = pipe(PROMPT, { responseFormat: { type: 'grammar', ebnf: 'root ::= missing' } });
  await expect(malformed).rejects.toMatchObject({
    code: 'ERR_TM_INVALID_OPTION',
    message: expect.stringContaining('missing'),
  });
});

test('an abort mid-way ends the request and leaves the engine idle', async () => {
  const abort = new AbortController();
  const responseFormat = { type: 'regex_schema', regexSchema: 'a{2000}' } as const;
  const options = { responseFormat, maxNewTokens: null, signal: abort.signal };
  let parts = 0;
  const reading = (async () => {
    for await (const _ of pipe.stream(PROMPT, options)) {
      parts += 1;
      if (parts === 3) abort.abort(new Error('enough'));
    }
  })();
  await expect(reading).rejects.toThrow('enough');
  const after = await pipe(PROMPT, { ...sampled, randomSeed: 1, responseFormat: json });
  expect(after.finishReason).toBe('stop');
  expect(pipe.stats().running).toBe(0);
});

test.each([
  ['ends', 'await pipe.close();'],
  [
    'exits while a mask is computed',
    "for await (const _ of pipe.stream('Hello!', options)) process.exit(0);",
  ],
  [
    'is killed',
    "for await (const _ of pipe.stream('Hello!', options)) process.kill(process.pid, 'SIGKILL');",
  ],
])('a process that %s leaves no file behind', async (_, last) => {
  const folder = mkdtempSync(join(tmpdir(), 'turbomind-left-'));
  const text = `import { pipeline } from LIB;
    const pipe = await pipeline({ device: 'cpu' });
    const options = { responseFormat: { type: 'regex_schema', regexSchema: 'a{20}' } };
    console.log((await pipe('Hello!', options)).text);
    ${last}`;
  const { stdout, stderr } = await runModule(text, { env: { TMPDIR: folder } });
  expect([stdout, stderr]).toEqual([`${'a'.repeat(20)}\n`, '']);
  expect(readdirSync(folder)).toEqual([]);
});
