// Starts the thread of grammar-worker.ts. Always from dist/: the worker and the matcher's module
// are files there, also when tests run the library from its sources. Runs on the JS thread.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { TurbomindError } from '../errors.js';
import { packageRoot } from '../native.js';
import type { FromWorker, Vocabulary, WorkerStart } from './protocol.js';
import type { WorkerHandlers, WorkerPort } from './worker-port.js';

/** @throws TurbomindError ERR_TM_INTERNAL when the package's files are not there. */
export function startWorker(vocabulary: Vocabulary, handlers: WorkerHandlers): WorkerPort {
  const dist = join(packageRoot(), 'dist');
  const file = join(dist, 'structured', 'grammar-worker.js');
  const matcher = join(dist, 'vendor', 'web-xgrammar.cjs');
  for (const path of [file, matcher]) {
    if (existsSync(path)) continue;
    throw new TurbomindError(
      'ERR_TM_INTERNAL',
      `responseFormat: ${path} is missing; install the package again, or in a clone run ` +
        'npm run build:ts',
    );
  }
  const start: WorkerStart = { vocabulary, matcher };
  // The process's own flags are about its own code: `--input-type` would keep a worker from starting.
  const worker = new Worker(file, { workerData: start, name: 'turbomind-grammar', execArgv: [] });
  worker.unref();
  worker.on('message', (message: FromWorker) => handlers.message(message));
  worker.on('error', (error) => handlers.lost(error.message));
  worker.on('exit', (code) => handlers.lost(`its thread ended with code ${code}`));
  return {
    post: (message) => worker.postMessage(message),
    hold: (isHeld) => (isHeld ? worker.ref() : worker.unref()),
    terminate: () => worker.terminate(),
  };
}
