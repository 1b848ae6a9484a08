// A Prometheus endpoint beside a pipeline: node examples/metrics.mjs [model folder], then
// curl localhost:9464/metrics, or localhost:9464/ask?prompt=Hello! to make something happen.
import { createServer } from 'node:http';
import { pipeline } from '@org/turbomind-node';
import { collectDefaultMetrics, register } from 'prom-client';

const pipe = await pipeline(process.argv[2]);
pipe.registerMetrics(register, { labels: { model: 'default' } });
collectDefaultMetrics();

createServer(async ({ url = '/' }, response) => {
  try {
    const { pathname, searchParams } = new URL(url, 'http://localhost');
    if (pathname === '/metrics') {
      response.setHeader('content-type', register.contentType);
      response.end(await register.metrics());
    } else if (pathname === '/ask') {
      response.end((await pipe(searchParams.get('prompt') ?? 'Hello!')).text);
    } else {
      response.writeHead(404).end();
    }
  } catch (error) {
    response.writeHead(500).end(error.message);
  }
}).listen(9464);
