// A streamed answer that is given up after a second. Run: node examples/stream.mjs
import { pipeline, TurbomindError } from '@org/turbomind-node';

const pipe = await pipeline();
const messages = [
  { role: 'system', content: 'You are a helpful assistant.' },
  { role: 'user', content: 'Hello!' },
];
try {
  for await (const part of pipe.stream(messages, { signal: AbortSignal.timeout(1000) })) {
    process.stdout.write(part.text);
    if (part.response) console.log('\n', part.finishReason, part.response.timings);
  }
} catch (error) {
  if (error instanceof TurbomindError) console.error(error.code, error.message);
  else console.error('given up:', error.name);
}
await pipe.close();
