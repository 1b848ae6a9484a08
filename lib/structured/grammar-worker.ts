// The thread that owns the matcher: hands messages to a GrammarHost. Started by grammar-service.ts.
import { parentPort, workerData } from 'node:worker_threads';
import { GrammarHost } from './grammar-host.js';
import type { ToWorker, WorkerStart } from './protocol.js';
import { makeLoader } from './xgrammar.js';

const start: WorkerStart = workerData;
const port = parentPort;
if (port === null) throw new Error('grammar-worker.js is started by its pipeline');
const host = new GrammarHost(makeLoader(start.matcher), start.vocabulary, (message) => {
  port.postMessage(message);
});
port.on('message', (message: ToWorker) => {
  void host.handle(message);
});
