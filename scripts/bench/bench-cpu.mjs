// npm run bench:cpu: decode, prefill, load and memory of a Qwen2.5-0.5B-shaped AWQ model on the CPU,
// quiet and with a neighbour that burns every core, against the measured read bandwidth and, where
// --peer FOLDER holds node_modules/node-llama-cpp, against it in turn (A B A B …) in the same run.
import { execFile, spawn } from 'node:child_process';
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';

const here = dirname(fileURLToPath(import.meta.url));
const root = join(here, '..', '..');
const run = promisify(execFile);
const { values } = parseArgs({
  options: {
    peer: { type: 'string' },
    tokenizer: { type: 'string' },
    repeats: { type: 'string', default: '3' },
    threads: { type: 'string', default: '2' },
    work: { type: 'string', default: join(root, '.bench') },
    out: { type: 'string' },
  },
});
const model = join(values.work, 'qwen2.5-0.5b-awq');
const gguf = join(values.work, 'qwen2.5-0.5b-q4_0.gguf');
const tokenizer = values.tokenizer ? ['--tokenizer', values.tokenizer] : [];
mkdirSync(values.work, { recursive: true });
const node = process.execPath;
const log = (text) => process.stderr.write(`${text}\n`);
if (!existsSync(join(model, 'generation_config.json'))) {
  log('making the random AWQ model (0.46 GB)…');
  await run(node, [join(here, 'make-model.mjs'), model, ...tokenizer]);
}
if (values.peer && !existsSync(gguf)) {
  log("making the peer's random GGUF model (0.35 GB)…");
  await run(node, [join(here, 'make-gguf.mjs'), gguf, ...tokenizer]);
}

const ours = (tokens) =>
  run(node, [join(here, 'run-ours.mjs'), model, '--threads', values.threads, '--tokens', tokens]);
// The peer sizes its context by its sequences: 4 for the main figures, 16 in a process of its own.
async function peer(tokens) {
  const args = [
    join(here, 'run-peer.mjs'),
    gguf,
    '--from',
    values.peer,
    '--threads',
    values.threads,
    '--tokens',
    tokens,
  ];
  const four = JSON.parse((await run(node, args)).stdout);
  const sixteen = JSON.parse((await run(node, [...args, '--sequences', '16'])).stdout);
  return { ...four, decode4: four.decodeTogether, decode16: sixteen.decodeTogether };
}
const bandwidthTool = join(root, 'build', 'test', 'native', 'bench_bandwidth');
async function bandwidth() {
  if (!existsSync(bandwidthTool))
    throw new Error(`${bandwidthTool} is missing: run npm run build:native first`);
  return JSON.parse((await run(bandwidthTool, [values.threads])).stdout).gbPerSecond;
}
function burn() {
  const children = os.cpus().map(() => spawn(node, ['-e', 'for(;;){}'], { stdio: 'ignore' }));
  return () => {
    for (const child of children) child.kill('SIGKILL');
  };
}
const median = (list) => {
  const sorted = [...list].sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
};

async function measure(label, repeats, tokens) {
  const samples = { ours: [], peer: [], bandwidth: [] };
  for (let i = 0; i < repeats; i++) {
    samples.bandwidth.push(await bandwidth());
    samples.ours.push(JSON.parse((await ours(tokens)).stdout));
    if (values.peer) samples.peer.push(await peer(tokens));
    log(`${label}: round ${i + 1} of ${repeats} done`);
  }
  const columns = {
    'load, process start to ready (ms)': (r) => r.loadMs,
    'peak RSS (MiB)': (r) => r.peakRssMiB,
    'prefill 512, first request (tok/s)': (r) => r.first.prefill,
    'prefill 512 (tok/s)': (r) => r.steady.prefill,
    'decode, batch 1 (tok/s)': (r) => r.steady.decode1,
    'decode, batch 4 (tok/s in sum)': (r) => r.decode4,
    'decode, batch 16 (tok/s in sum)': (r) => r.decode16,
  };
  const table = Object.entries(columns).map(([name, read]) => {
    const a = samples.ours.map(read);
    const b = samples.peer.map(read);
    return {
      name,
      ours: median(a),
      range: [Math.min(...a), Math.max(...a)],
      ...(b.length ? { peer: median(b), peerRange: [Math.min(...b), Math.max(...b)] } : {}),
    };
  });
  return {
    label,
    bandwidthGBs: median(samples.bandwidth),
    weightBytes: samples.ours[0].weightBytes,
    device: samples.ours[0].device,
    table,
    samples,
  };
}

const repeats = Number(values.repeats);
const quiet = await measure('quiet', repeats, '128');
const stop = burn();
let busy;
try {
  // Fewer tokens: a pool that spins at every barrier can fall to one token a second here.
  busy = await measure('busy: a second process burns every core', 1, '24');
} finally {
  stop();
}
const report = {
  date: new Date().toISOString(),
  cpu: os.cpus()[0]?.model,
  cores: os.cpus().length,
  node: process.version,
  quiet,
  busy,
};
const out = values.out ?? join(values.work, 'bench-cpu.json');
writeFileSync(out, JSON.stringify(report, null, 1));

const show = (v) => (v >= 100 ? v.toFixed(0) : v.toFixed(1));
for (const part of [quiet, busy]) {
  console.log(
    `\n${part.label}: ${report.cpu} x ${report.cores}, ${part.device}, read bandwidth ${show(part.bandwidthGBs)} GB/s`,
  );
  console.log(
    '| figure | turbomind-node | range | node-llama-cpp | range | ratio |\n| --- | --- | --- | --- | --- | --- |',
  );
  for (const row of part.table) {
    const peerCells =
      row.peer === undefined
        ? '– | – | –'
        : `${show(row.peer)} | ${row.peerRange.map(show).join('–')} | ${(row.ours / row.peer).toFixed(2)}`;
    console.log(
      `| ${row.name} | ${show(row.ours)} | ${row.range.map(show).join('–')} | ${peerCells} |`,
    );
  }
  const decode = part.table.find((row) => row.name.startsWith('decode, batch 1')).ours;
  const limit = (part.bandwidthGBs * 1e9) / part.weightBytes;
  console.log(
    `decode at batch 1: ${((100 * decode) / limit).toFixed(0)} % of what reading ${(part.weightBytes / 1e6).toFixed(0)} MB of weights a token allows (${show(limit)} tok/s)`,
  );
}
log(`written: ${out}`);
