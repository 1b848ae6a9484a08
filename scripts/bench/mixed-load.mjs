// What a busy service asks for, as one load: texts, pictures, schemas, samples, n choices, streams,
// random aborts. Each answer is checked. The soak runs it for half an hour, an end-to-end test for
// seconds; opening, closing and judging of time and memory are theirs.
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { root } from '../lib.mjs';

const picture = join(root, 'examples', 'shapes.png');
const schema = {
  type: 'object',
  properties: {
    name: { type: 'string', maxLength: 12 },
    count: { type: 'integer', minimum: 0, maximum: 99 },
    tags: { type: 'array', items: { enum: ['a', 'b', 'c'] }, maxItems: 3 },
  },
  required: ['name', 'count'],
};
const responseFormat = { type: 'json_schema', jsonSchema: { schema } };

const KINDS = {
  text: () => ['What is 27 + 45?', {}],
  long: (random) => [
    `Hello! ${'word '.repeat(Math.floor(random() * 200))}`,
    { ignoreEos: true, maxNewTokens: 80 },
  ],
  sampled: () => [
    'Hello!',
    { doSample: true, temperature: 1.2, ignoreEos: true, maxNewTokens: 60 },
  ],
  picture: () => [{ text: 'What colour is the largest shape?', images: [picture] }, {}],
  schema: () => ['Hello!', { doSample: true, responseFormat, maxNewTokens: null }],
  choice: () => ['Hello!', { responseFormat: { type: 'choice', choices: ['yes', 'no', 'maybe'] } }],
  several: () => ['Hello!', { doSample: true, n: 2, maxNewTokens: 40 }],
  words: () => ['Spell the word house.', { stopWords: ['s'], logprobs: 2 }],
};
const WEIGHTS = [
  'text',
  'long',
  'long',
  'sampled',
  'sampled',
  'schema',
  'choice',
  'several',
  'words',
];
const MOST_PROBLEMS = 20;

/**
 * `streams` clients ask the embedded model one thing after the other until `seconds` are over. One
 * client in `pictureEvery` looks at pictures, which cost most. Never rejects: `problems` tells what
 * was wrong, `counts.failed` how much.
 */
export async function runMixedLoad(pipe, { seconds, streams, pictureEvery, seed }) {
  const load = new MixedLoad(pipe, seed);
  const endAt = performance.now() + seconds * 1000;
  const client = async (index) => {
    while (performance.now() < endAt) await load.one(index % pictureEvery === 0);
  };
  await Promise.all(Array.from({ length: streams }, (_, index) => client(index)));
  return { ...load.report(), idle: await untilIdle(pipe) };
}

/** Whether every request that was started has ended, and each as it should. */
export function isSound({ counts, idle }) {
  return {
    noFailures: counts.failed === 0,
    everyRequestEnds: counts.started === counts.finished + counts.aborted + counts.broken,
    idleAfterwards:
      idle.running === 0 && idle.waiting === 0 && idle.freeBlocks === idle.totalBlocks,
  };
}

class MixedLoad {
  #pipe;
  #state;
  #counts = { started: 0, finished: 0, aborted: 0, broken: 0, failed: 0, tokens: 0 };
  #byKind = {};
  #problems = [];
  /** What the picture's first answer was. */
  #seen;

  constructor(pipe, seed) {
    this.#pipe = pipe;
    this.#state = seed;
  }

  report() {
    return { counts: this.#counts, byKind: this.#byKind, problems: this.#problems };
  }

  #random() {
    this.#state = (Math.imul(this.#state, 1664525) + 1013904223) >>> 0;
    return this.#state / 2 ** 32;
  }

  async one(isPicture) {
    const random = () => this.#random();
    const kind = isPicture ? 'picture' : WEIGHTS[Math.floor(random() * WEIGHTS.length)];
    const [prompt, options] = KINDS[kind](random);
    const abort = random() < 0.15 ? new AbortController() : undefined;
    const leaveAfter = random() < 0.1 ? Math.floor(random() * 20) : Number.POSITIVE_INFINITY;
    if (abort) setTimeout(() => abort.abort(new Error('mixed load')), random() * 400).unref();
    this.#counts.started += 1;
    this.#byKind[kind] = (this.#byKind[kind] ?? 0) + 1;
    let parts = 0;
    const ends = [];
    try {
      const stream = this.#pipe.stream(prompt, { ...options, signal: abort?.signal });
      for await (const part of stream) {
        parts += 1;
        this.#counts.tokens += part.tokenIds.length;
        if (part.response) ends.push(part.response);
        if (parts > leaveAfter) break;
      }
      if (parts > leaveAfter) this.#counts.aborted += 1;
      else this.#finish(kind, ends, options);
    } catch (error) {
      if (abort?.signal.aborted && error === abort.signal.reason) this.#counts.aborted += 1;
      else {
        this.#counts.broken += 1;
        this.#fail(kind, error.code ? `${error.code}: ${error.message}` : String(error));
      }
    }
  }

  #finish(kind, ends, options) {
    this.#counts.finished += 1;
    if (ends.length !== (options.n ?? 1)) this.#fail(kind, `${ends.length} ends`);
    for (const { finishReason, text } of ends) {
      if (finishReason !== 'stop' && finishReason !== 'length')
        this.#fail(kind, `ended by ${finishReason}`);
      if (kind === 'text' && text !== '72') this.#fail(kind, `said ${JSON.stringify(text)}`);
      if (kind === 'picture' && text !== 'red') this.#note(text);
      if (kind === 'choice' && !['yes', 'no', 'maybe'].includes(text))
        this.#fail(kind, `said ${text}`);
      if (kind === 'schema' && finishReason === 'stop') this.#checkSchema(text);
    }
  }

  // The same picture has the same answer, whoever else runs.
  #note(text) {
    this.#seen ??= text;
    if (text === this.#seen) return;
    this.#fail('picture', `said ${JSON.stringify(text)} and ${JSON.stringify(this.#seen)}`);
  }

  #checkSchema(text) {
    try {
      const { name, count } = JSON.parse(text);
      if (typeof name !== 'string' || !(count >= 0 && count <= 99)) this.#fail('schema', text);
    } catch (error) {
      this.#fail('schema', `${error.message}: ${text}`);
    }
  }

  #fail(kind, problem) {
    this.#counts.failed += 1;
    if (this.#problems.length < MOST_PROBLEMS) this.#problems.push({ kind, problem });
  }
}

async function untilIdle(pipe) {
  let stats = pipe.stats();
  for (let tries = 0; tries < 200 && stats.running + stats.waiting > 0; tries += 1) {
    await wait(25);
    stats = pipe.stats();
  }
  const { running, waiting, freeBlocks, totalBlocks } = stats;
  return { running, waiting, freeBlocks, totalBlocks };
}
