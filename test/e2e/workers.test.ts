// Life and death of environments: worker threads, exit while the engine works, memory after close.

import { Worker } from 'node:worker_threads';
import { describe, expect, test } from 'vitest';
import { distUrl, runModule } from './support/paths.js';

const ANSWER = `
  import { parentPort, workerData } from 'node:worker_threads';
  import { pipeline } from ${JSON.stringify(distUrl)};
  const pipe = await pipeline({ device: 'cpu', sessionLen: 1024, threads: 1 });
  const responses = await pipe(workerData.prompts);
  parentPort.postMessage(responses.map(({ text }) => text));
  if (workerData.close) await pipe.close();
  if (workerData.goOn) {
    for await (const part of pipe.stream('Hello!', { ignoreEos: true, maxNewTokens: 900 })) {
      parentPort.postMessage(part.text);
    }
  }
`;

function start(workerData: object): Worker {
  const url = new URL(`data:text/javascript,${encodeURIComponent(ANSWER)}`);
  return new Worker(url, { workerData });
}

function nextMessage(worker: Worker): Promise<unknown> {
  return new Promise((resolve, reject) => {
    worker.once('message', resolve);
    worker.once('error', reject);
  });
}

function ended(worker: Worker): Promise<number> {
  return new Promise((resolve) => worker.once('exit', resolve));
}

describe('worker threads', () => {
  test('two with a pipeline each, one of which never closes it', async () => {
    const workers = [true, false].map((close) =>
      start({ prompts: ['What is 27 + 45?', 'Hello!'], close }),
    );
    const exits = workers.map(ended);
    const answers = await Promise.all(workers.map(nextMessage));
    expect(answers).toEqual([
      ['72', 'Hello! How can I help you?'],
      ['72', 'Hello! How can I help you?'],
    ]);
    expect(await Promise.all(exits)).toEqual([0, 0]);
  });

  test('one that is terminated during generation takes nothing down', async () => {
    const worker = start({ prompts: ['Hello!'], goOn: true });
    const exit = ended(worker);
    await nextMessage(worker);
    await nextMessage(worker);
    await worker.terminate();
    await exit;
    const other = start({ prompts: ['What is 27 + 45?'], close: true });
    expect(await nextMessage(other)).toEqual(['72']);
    expect(await ended(other)).toBe(0);
  });
});

describe('process exit', () => {
  test('comes by itself when nothing runs, without close()', async () => {
    const { code, signal, stdout, stderr } = await runModule(`
      import { pipeline } from LIB;
      const pipe = await pipeline({ device: 'cpu', sessionLen: 512 });
      console.log((await pipe('What is 27 + 45?')).text);`);
    expect({ code, signal, stdout, stderr }).toEqual({
      code: 0,
      signal: null,
      stdout: '72\n',
      stderr: '',
    });
  });

  test('waits for an answer that is being made', async () => {
    const { code, stdout } = await runModule(`
      import { pipeline } from LIB;
      const pipe = await pipeline({ device: 'cpu', sessionLen: 512 });
      pipe('Hello!', { ignoreEos: true, maxNewTokens: 50 }).then((r) => console.log(r.generateTokenLen));`);
    expect({ code, stdout }).toEqual({ code: 0, stdout: '50\n' });
  });

  test('by process.exit() during generation is clean', async () => {
    const { code, signal } = await runModule(`
      import { pipeline } from LIB;
      const pipe = await pipeline({ device: 'cpu' });
      for await (const part of pipe.stream('Hello!', { ignoreEos: true, maxNewTokens: 2000 })) {
        process.exit(7);
      }`);
    expect({ code, signal }).toEqual({ code: 7, signal: null });
  });

  test('by process.exit() during loading is clean', async () => {
    const { code, signal } = await runModule(`
      import { pipeline } from LIB;
      pipeline({ device: 'cpu', onProgress: () => process.exit(8) });`);
    expect({ code, signal }).toEqual({ code: 8, signal: null });
  });
});

describe('memory', () => {
  test('returns after close()', async () => {
    const { stdout, stderr, code } = await runModule(
      `import { pipeline } from LIB;
       import { setTimeout as wait } from 'node:timers/promises';
       const sizes = [];
       for (let round = 0; round < 6; round++) {
         const pipe = await pipeline({ device: 'cpu', sessionLen: 4096 });
         await pipe(['Hello!', 'What is 27 + 45?'], { ignoreEos: true, maxNewTokens: 64 });
         const open = process.memoryUsage.rss();
         await pipe.close();
         for (let i = 0; i < 3; i++) { global.gc(); await wait(20); }
         sizes.push({ open, closed: process.memoryUsage.rss() });
       }
       console.log(JSON.stringify(sizes));`,
      {},
      ['--expose-gc'],
    );
    expect(stderr).toBe('');
    expect(code).toBe(0);
    const sizes: { open: number; closed: number }[] = JSON.parse(stdout);
    const growth = (sizes.at(-1)?.closed ?? 0) - (sizes[1]?.closed ?? 0);
    // Four more pipelines of some 30 MB each must leave next to nothing.
    expect(growth / 2 ** 20).toBeLessThan(16);
  });
});
