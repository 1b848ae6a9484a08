// Pipelines on the CPU that a test file opens as it goes; all are closed when the file has run.
import { afterAll } from 'vitest';
import { type Pipeline, type PipelineOptions, pipeline } from '../../../lib/index.js';

const opened: Pipeline[] = [];
afterAll(() => Promise.all(opened.map((pipe) => pipe.close())));

export async function open(options: PipelineOptions): Promise<Pipeline> {
  const pipe = await pipeline({ device: 'cpu', ...options });
  opened.push(pipe);
  return pipe;
}
