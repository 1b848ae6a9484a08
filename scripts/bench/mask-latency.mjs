// How long masks take: random walks through the grammars of schemas, a token at a time, once on a
// grammar worker with the messages there and back, as in a pipeline, and once the matcher alone.
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

/** Milliseconds a mask; the same walks both ways. */
export async function measureMasks(tokenizer, fixtures) {
  const sources = fixtures.map(({ name, schema }) =>
    readResponseFormat({ type: 'json_schema', jsonSchema: { name, schema } }),
  );
  const service = new GrammarService({ tokenizer, vocabSize: tokenizer.vocabSize, startWorker });
  // In a pipeline the engine keeps the process alive, not the grammar worker.
  const awake = setInterval(() => {}, 1000);
  const throughWorker = await walkAll(sources, tokenizer, openOnWorker(service, tokenizer));
  clearInterval(awake);
  await service.close();
  const inPlace = await walkAll(sources, tokenizer, await openInPlace(tokenizer));
  const trips = throughWorker.map((ms, index) => ms - inPlace[index]);
  return {
    vocabSize: tokenizer.vocabSize,
    masks: inPlace.length,
    matcherMs: shares(inPlace),
    withMessagesMs: shares(throughWorker),
    messagesMs: { p50: round(quantile(trips, 0.5)) },
  };
}

async function walkAll(sources, tokenizer, open) {
  const times = [];
  let state = 1;
  const random = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  for (const source of sources) {
    for (let walk = 0; walk < WALKS; walk += 1) {
      const session = await open(source);
      for (let step = 0; step < MOST_TOKENS; step += 1) {
        const allowed = allowedIn(session.mask);
        const token = allowed[Math.floor(random() * allowed.length)];
        if (tokenizer.eosIds.includes(token)) break;
        const started = performance.now();
        await session.advance(token);
        times.push(performance.now() - started);
      }
      session.close();
    }
  }
  return times;
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
  const matcher = join(root, 'dist', 'vendor', 'web-xgrammar.cjs');
  const vocabulary = await readVocabulary(tokenizer, tokenizer.vocabSize);
  const host = new GrammarHost(makeLoader(matcher), vocabulary, (message) => {
    if (message.type === 'broken' || message.type === 'refused') throw new Error(message.reason);
  });
  let lastSession = 0;
  return async ({ ebnf, isForeign }) => {
    lastSession += 1;
    const session = lastSession;
    const buffer = new SharedArrayBuffer(Math.ceil(tokenizer.vocabSize / 32) * 4);
    const { eosIds: stopIds } = tokenizer;
    const accepted = [];
    await host.handle({
      type: 'open',
      session,
      ebnf,
      isForeign,
      stopIds,
      mask: buffer,
      accepted,
    });
    return {
      mask: new Uint32Array(buffer),
      advance: (token) => host.handle({ type: 'advance', steps: [{ session, tokens: [token] }] }),
      close: () => void host.handle({ type: 'close', session }),
    };
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
