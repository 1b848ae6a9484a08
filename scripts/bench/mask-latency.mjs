// How long grammars take to compile and masks to compute: random walks through the grammars of schemas,
// a token at a time, once on a grammar worker with the messages there and back, as in a pipeline, and
// once the matcher alone.
import { join } from 'node:path';
import { GrammarHost } from '../../dist/structured/grammar-host.js';
import { GrammarService } from '../../dist/structured/grammar-service.js';
import { readResponseFormat } from '../../dist/structured/response-format.js';
import { startWorker } from '../../dist/structured/start-worker.js';
import { readVocabulary } from '../../dist/structured/vocabulary.js';
import { makeLoader } from '../../dist/structured/xgrammar.js';
import { root } from '../lib.mjs';
import { quantile, round } from './statistics.mjs';

const WALKS = 3;
const MOST_TOKENS = 60;
// A text of any length, by a rule that is repeated and by one that ends with itself.
const ANY_TEXT = {
  repeatedRule: 'root ::= "\\"" c* "\\""\nc ::= [^"\\x00-\\x1f\\x80-\\xff]',
  ownEnd: 'root ::= "\\"" s\ns ::= "\\"" | [^"\\x00-\\x1f\\x80-\\xff] s',
};

/** Milliseconds; the same walks both ways. Grammars are compiled in the walk with the matcher alone. */
export async function measureMasks(tokenizer, fixtures) {
  const sources = fixtures.map(({ name, schema }) => ({
    ...readResponseFormat({ type: 'json_schema', jsonSchema: { name, schema } }),
    name,
  }));
  const service = new GrammarService({ tokenizer, vocabSize: tokenizer.vocabSize, startWorker });
  // In a pipeline the engine keeps the process alive, not the grammar worker.
  const awake = setInterval(() => {}, 1000);
  const throughWorker = await walkAll(sources, tokenizer, openOnWorker(service, tokenizer));
  clearInterval(awake);
  await service.close();
  const before = process.memoryUsage().rss;
  const matcher = await openInPlace(tokenizer);
  const started = performance.now();
  (await matcher.open({ ebnf: 'root ::= "a"', isForeign: false })).close();
  const startMs = performance.now() - started;
  const inPlace = await walkAll(sources, tokenizer, matcher.open);
  const rss = process.memoryUsage().rss - before;
  const trips = throughWorker.masks.map((ms, index) => ms - inPlace.masks[index]);
  const slowest = inPlace.compiles.reduce((worst, each) => (each.ms > worst.ms ? each : worst));
  return {
    vocabSize: tokenizer.vocabSize,
    // On the JS thread, in slices; once a pipeline.
    readVocabularyMs: round(matcher.readMs),
    // On the worker, once: the module, the vocabulary's order, a grammar of one letter.
    startMs: round(startMs),
    compileMs: { ...shares(inPlace.compiles.map(({ ms }) => ms)), slowest: slowest.name },
    masks: inPlace.masks.length,
    matcherMs: shares(inPlace.masks),
    withMessagesMs: shares(throughWorker.masks),
    messagesMs: { p50: round(quantile(trips, 0.5)) },
    matcherMib: round(rss / 2 ** 20),
    anyTextMs: {
      repeatedRule: await anyText(matcher, tokenizer, ANY_TEXT.repeatedRule),
      ownEnd: await anyText(matcher, tokenizer, ANY_TEXT.ownEnd),
    },
  };
}

async function walkAll(sources, tokenizer, open) {
  const masks = [];
  const compiles = [];
  const random = lcg();
  for (const source of sources) {
    for (let walk = 0; walk < WALKS; walk += 1) {
      const opened = performance.now();
      const session = await open(source);
      if (walk === 0) compiles.push({ name: source.name, ms: performance.now() - opened });
      for (let step = 0; step < MOST_TOKENS; step += 1) {
        const allowed = allowedIn(session.mask);
        const token = allowed[Math.floor(random() * allowed.length)];
        if (tokenizer.eosIds.includes(token)) break;
        const started = performance.now();
        await session.advance(token);
        masks.push(performance.now() - started);
      }
      session.close();
    }
  }
  return { masks, compiles };
}

/** Compiling, and the masks inside a text of 100 tokens. */
async function anyText({ open }, tokenizer, ebnf) {
  const random = lcg();
  const opened = performance.now();
  const session = await open({ ebnf, isForeign: false });
  const compile = round(performance.now() - opened);
  const times = [];
  const quote = '"'.charCodeAt(0);
  for (let step = 0; step < 100; step += 1) {
    const inside = allowedIn(session.mask).filter((id) => {
      return step === 0 || !tokenizer.bytesOf(id).includes(quote);
    });
    const token = inside[Math.floor(random() * inside.length)];
    const started = performance.now();
    await session.advance(token);
    times.push(performance.now() - started);
  }
  session.close();
  return { compile, ...shares(times) };
}

function openOnWorker(service, tokenizer) {
  return async (source) => {
    const session = await service.open(source, tokenizer.eosIds);
    return {
      mask: session.mask,
      advance: (token) => new Promise((done, fail) => session.advance([token], done, fail)),
      close: () => session.close(),
    };
  };
}

async function openInPlace(tokenizer) {
  tokenizer.prepare(); // as a pipeline does when it opens
  const path = join(root, 'dist', 'vendor', 'web-xgrammar.cjs');
  const started = performance.now();
  const vocabulary = await readVocabulary(tokenizer, tokenizer.vocabSize);
  const readMs = performance.now() - started;
  const host = new GrammarHost(makeLoader(path), vocabulary, (message) => {
    if (message.type === 'broken' || message.type === 'refused') throw new Error(message.reason);
  });
  let lastSession = 0;
  const { eosIds: stopIds } = tokenizer;
  const open = async ({ ebnf, isForeign }) => {
    lastSession += 1;
    const session = lastSession;
    const mask = new SharedArrayBuffer(Math.ceil(tokenizer.vocabSize / 32) * 4);
    await host.handle({ type: 'open', session, ebnf, isForeign, stopIds, mask, accepted: [] });
    return {
      mask: new Uint32Array(mask),
      advance: (token) => host.handle({ type: 'advance', steps: [{ session, tokens: [token] }] }),
      close: () => void host.handle({ type: 'close', session }),
    };
  };
  return { open, readMs };
}

function lcg() {
  let state = 1;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

function allowedIn(mask) {
  const tokens = [];
  for (const [index, word] of mask.entries()) {
    for (let bit = 0; bit < 32; bit += 1) {
      if ((word >>> bit) & 1) tokens.push(index * 32 + bit);
    }
  }
  return tokens;
}

function shares(times) {
  return {
    p50: round(quantile(times, 0.5)),
    p99: round(quantile(times, 0.99)),
    max: round(Math.max(...times)),
  };
}
