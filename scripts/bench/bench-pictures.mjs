// What a picture costs before its request reaches the engine: wall clock, how long the JS thread works
// for it and the longest it is kept at a time, for the first question about a picture and for the second.
// Decoding, hashing and cutting are the library's; prompts are not rendered, no model is opened.
//   node scripts/bench/bench-pictures.mjs [--repeats 7] [--json]      (after npm run build)

import { loadavg } from 'node:os';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import sharp from 'sharp';

const { values: flags } = parseArgs({
  options: { repeats: { type: 'string', default: '7' }, json: { type: 'boolean', default: false } },
});
const dist = (name) => new URL(`../../dist/${name}.js`, import.meta.url);
const { RequestPreparer } = await import(dist('prepare'));
const { resolveGenerationOptions } = await import(dist('options'));
const { loadNative } = await import(dist('native'));
const { addon } = loadNative();

const IMAGE = {
  tileSize: 448,
  minDynamicPatch: 1,
  maxDynamicPatch: 12,
  useThumbnail: true,
};
const newPreparer = () =>
  new RequestPreparer({
    addon,
    tokenizer: { eosIds: [], encode: () => new Int32Array(), isSpecial: () => false },
    promptBuilder: {
      build: (_, tiles) => ({
        ids: new Int32Array(1),
        imageSpans: tiles.map(() => ({ tokenOffset: 0, numTokens: 1 })),
      }),
    },
    image: IMAGE,
    tiling: {},
    imageLimits: { maxPixels: 2 ** 27, maxBytes: 2 ** 27, timeoutMs: 1000 },
    sessionLen: 4096,
    vocabSize: 100,
  });

let state = 1;
function noise(bytes) {
  const data = new Uint8Array(bytes);
  for (let i = 0; i < bytes; i += 1) {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    data[i] = state >>> 24;
  }
  return data;
}
const raw = (width, height) => ({ data: noise(width * height * 3), width, height, channels: 3 });
const small = raw(1792, 1344);
const large = raw(4000, 3000);
const encoder = ({ data, width, height, channels }) =>
  sharp(data, { raw: { width, height, channels } });
const jpeg = await encoder(small).jpeg({ quality: 90 }).toBuffer();
const png = await encoder(small).png({ compressionLevel: 1 }).toBuffer();
const longPng = await encoder(large).png({ compressionLevel: 0 }).toBuffer();
const pictures = {
  'raw 1792x1344': small,
  'raw 4000x3000': large,
  JPEG: jpeg,
  PNG: png,
  'data URL of the JPEG': `data:image/jpeg;base64,${jpeg.toString('base64')}`,
  'data URL of a large PNG': `data:image/png;base64,${longPng.toString('base64')}`,
  'the same in lines of 76': `data:image/png;base64,${longPng.toString('base64').replace(/.{76}/g, '$&\r\n')}`,
};

const options = resolveGenerationOptions();
const conversation = (image) => [{ role: 'user', content: [{ type: 'image', image }] }];

async function timed(preparer, image) {
  const before = performance.eventLoopUtilization();
  const begin = performance.now();
  await preparer.prepare(conversation(image), options);
  const wall = performance.now() - begin;
  return { wall, busy: performance.eventLoopUtilization(before).active };
}

// A loop that never sleeps sees every pause of the JS thread.
async function longestBlock(preparer, image) {
  let longest = 0;
  let last = performance.now();
  let running = true;
  const tick = () => {
    const now = performance.now();
    longest = Math.max(longest, now - last);
    last = now;
    if (running) setImmediate(tick);
  };
  setImmediate(tick);
  await new Promise((resolve) => setImmediate(resolve));
  last = performance.now();
  await preparer.prepare(conversation(image), options);
  tick();
  running = false;
  return longest;
}

const median = (list) => list.sort((a, b) => a - b)[Math.floor(list.length / 2)];
const pause = () => new Promise((resolve) => setTimeout(resolve, 5));

const rows = [];
for (const [name, image] of Object.entries(pictures)) {
  const bytes = typeof image === 'string' ? image.length : (image.data ?? image).length;
  const columns = { first: [], second: [] };
  const blocks = { first: [], second: [] };
  for (let i = 0; i < Number(flags.repeats); i += 1) {
    for (const [into, run] of [
      [columns, timed],
      [blocks, longestBlock],
    ]) {
      const preparer = newPreparer();
      for (const which of ['first', 'second']) {
        await pause();
        into[which].push(await run(preparer, image));
      }
    }
  }
  for (const which of ['first', 'second']) {
    rows.push({
      name,
      megabytes: Number((bytes / 1e6).toFixed(1)),
      which,
      wallMs: Number(median(columns[which].map(({ wall }) => wall)).toFixed(2)),
      busyMs: Number(median(columns[which].map(({ busy }) => busy)).toFixed(2)),
      longestMs: Number(median(blocks[which]).toFixed(2)),
    });
  }
}
if (flags.json) console.log(JSON.stringify({ load: loadavg()[0], rows }));
else {
  console.log(
    `${fileURLToPath(import.meta.url)
      .split('/')
      .at(-1)}: load ${loadavg()[0].toFixed(1)}`,
  );
  console.table(rows);
}
