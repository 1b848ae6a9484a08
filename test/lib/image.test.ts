import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import fc from 'fast-check';
import sharp from 'sharp';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { decodeDataUrl, parseDataUrl } from '../../lib/data-url.js';
import { type ImageLimits, readPicture } from '../../lib/image.js';
import { hashOf, ownPixels } from '../../lib/image-pixels.js';
import type { ImageSource } from '../../lib/messages.js';
import { Turns } from '../../lib/turns.js';

const LIMITS: ImageLimits = { maxPixels: 10_000, maxBytes: 100_000, timeoutMs: 2_000 };
// 3 x 2, every byte distinct.
const PIXELS = Uint8Array.from({ length: 18 }, (_, index) => index * 14);
// Image.frombytes('CMYK', (3, 2), bytes(range(0, 240, 10))) saved as TIFF, and its convert('RGB').
const PILLOW_CMYK_TIFF = Buffer.from(
  'SUkqAAgAAAAKAAABBAABAAAAAwAAAAEBBAABAAAAAgAAAAIBAwAEAAAAhgAAAAMBAwABAAAAAQAAAAYBAwABAAAABQAAABEBBAABAAAAjgAAABUBAwABAAAABAAAABYBBAABAAAAAgAAABcBBAABAAAAGAAAABwBAwABAAAAAQAAAAAAAAAIAAgACAAIAAAKFB4oMjxGUFpkbniCjJagqrS+yNLc5g==',
  'base64',
);
const PILLOW_CMYK_AS_RGB = [
  225, 216, 207, 156, 149, 141, 100, 94, 88, 56, 51, 47, 24, 22, 19, 5, 4, 3,
];
const folder = mkdtempSync(join(tmpdir(), 'turbomind-image-'));
let png: Buffer;
let server: Server;
let origin: string;

beforeAll(async () => {
  png = await encode(PIXELS, 3).png().toBuffer();
  writeFileSync(join(folder, 'a b.png'), png);
  server = createServer((request, response) => {
    const hops = /^\/hop\/(\d+)$/.exec(request.url ?? '');
    if (request.url === '/a.png') response.setHeader('content-type', 'text/html').end(png);
    else if (hops && hops[1] !== '0') redirect(`/hop/${Number(hops[1]) - 1}`);
    else if (hops) redirect('/a.png');
    else if (request.url === '/file') redirect('file:///etc/passwd');
    else if (request.url === '/big') response.end(Buffer.alloc(LIMITS.maxBytes + 1));
    else if (request.url === '/hang') response.write('x');
    else response.writeHead(404).end();
    function redirect(location: string): void {
      response.writeHead(302, { location }).end();
    }
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
afterAll(() => {
  server.closeAllConnections();
  server.close();
  rmSync(folder, { recursive: true });
});

function encode(data: Uint8Array, channels: 1 | 2 | 3 | 4) {
  return sharp(data, { raw: { width: 3, height: 2, channels } });
}

function load(source: ImageSource, limits: Partial<ImageLimits> = {}, signal?: AbortSignal) {
  return readPicture(source, { ...LIMITS, ...limits }, signal).then((picture) => picture.decode());
}

// Every picture as RGB, whatever number of channels it came with.
async function rgb(source: ImageSource): Promise<number[]> {
  const { data, width, height, channels } = await load(source);
  return Array.from({ length: width * height * 3 }, (_, index) => {
    const pixel = Math.floor(index / 3);
    return data[pixel * channels + (channels === 1 ? 0 : index % 3)] ?? -1;
  });
}

describe('sources', () => {
  test('all forms of the same picture give the same pixels', async () => {
    const path = join(folder, 'a b.png');
    const sources: ImageSource[] = [
      path,
      pathToFileURL(path),
      pathToFileURL(path).href,
      png,
      new Uint8Array(png),
      `data:image/png;base64,${png.toString('base64')}`,
      `data:;base64,${encodeURIComponent(png.toString('base64'))}`,
      `data:image/png,${[...png].map((byte) => `%${byte.toString(16).padStart(2, '0')}`).join('')}`,
      `${origin}/a.png`,
      new URL(`${origin}/hop/4`),
      sharp(png),
      { data: PIXELS, width: 3, height: 2, channels: 3 },
    ];
    for (const source of sources) expect(await rgb(source)).toEqual([...PIXELS]);
  });

  test('a sharp instance keeps its operations and stays usable', async () => {
    const instance = sharp(png).flop();
    expect((await rgb(instance)).slice(0, 3)).toEqual([...PIXELS.slice(6, 9)]);
    expect((await instance.png().toBuffer()).length).toBeGreaterThan(0);
  });
});

describe('pixels', () => {
  test('alpha is dropped, not blended', async () => {
    const rgba = Uint8Array.from({ length: 24 }, (_, i) => (i % 4 === 3 ? i : i * 10));
    const wanted = [...rgba].filter((_, i) => i % 4 !== 3);
    expect(await rgb(await encode(rgba, 4).png().toBuffer())).toEqual(wanted);
  });

  test('grey and palette are expanded', async () => {
    const grey = Uint8Array.from([0, 50, 100, 150, 200, 255]);
    const wanted = [...grey].flatMap((value) => [value, value, value]);
    const one = await encode(grey, 1).toColourspace('b-w').png().toBuffer();
    expect(await rgb(one)).toEqual(wanted);
    const palette = await encode(PIXELS, 3)
      .png({ palette: true, colours: 16, dither: 0 })
      .toBuffer();
    expect((await sharp(palette).metadata()).isPalette).toBe(true);
    expect(await rgb(palette)).toEqual([...PIXELS]);
  });

  test('16 bits keep their high byte', async () => {
    const high = Uint16Array.from(PIXELS, (value) => value * 256 + 200);
    const deep = await sharp(high, { raw: { width: 3, height: 2, channels: 3 } })
      .toColourspace('rgb16')
      .png()
      .toBuffer();
    expect((await sharp(deep).metadata()).depth).toBe('ushort');
    expect(await rgb(deep)).toEqual([...PIXELS]);
  });

  test('CMYK is multiplied by black, byte for byte as Pillow does', async () => {
    expect((await sharp(PILLOW_CMYK_TIFF).metadata()).space).toBe('cmyk');
    expect(await rgb(PILLOW_CMYK_TIFF)).toEqual(PILLOW_CMYK_AS_RGB);
  });

  test('EXIF orientation comes first', async () => {
    const turned = await encode(PIXELS, 3).withMetadata({ orientation: 6 }).png().toBuffer();
    const image = await load(turned);
    expect([image.width, image.height]).toEqual([2, 3]);
    expect([...image.data.slice(0, 3)]).toEqual([...PIXELS.slice(9, 12)]);
  });
});

describe('raw pixels', () => {
  test('are copied: whoever gave them may write to them afterwards', async () => {
    for (const data of [PIXELS.slice(), new Uint8Array(new SharedArrayBuffer(18))]) {
      data.set(PIXELS);
      const image = await load({ data, width: 3, height: 2, channels: 3 });
      data.fill(1);
      expect([...image.data]).toEqual([...PIXELS]);
    }
  });

  test('of any length arrive whole, with turns of the event loop between', async () => {
    const given = Uint8Array.from({ length: (1 << 22) + 5 }, (_, index) => index * 31);
    expect(Buffer.compare(await ownPixels(given, new Turns(0)), given)).toBe(0);
    let turns = 0;
    const count = setInterval(() => {
      turns += 1;
    }, 0);
    await ownPixels(new Uint8Array(1 << 26));
    clearInterval(count);
    expect(turns).toBeGreaterThan(1);
  });

  test.each([
    ['copied', (data: Uint8Array) => ownPixels(data, new Turns(0))],
    ['hashed', (data: Uint8Array) => hashOf({ hashBytes: () => '' }, data, new Turns(0))],
  ])('that are transferred while they are %s end with an error', async (_, read) => {
    const data = new Uint8Array(1 << 21);
    const reading = read(data);
    structuredClone(data.buffer, { transfer: [data.buffer] });
    await expect(reading).rejects.toMatchObject({
      code: 'ERR_TM_INVALID_IMAGE',
      message: expect.stringContaining('transferred'),
    });
  });

  test('are hashed whole and in order', async () => {
    const data = Uint8Array.from({ length: (1 << 20) + 5 }, (_, index) => index * 31);
    const pieces: Uint8Array[] = [];
    const hashBytes = (piece: Uint8Array, previous: string): string => {
      expect(previous).toBe(pieces.length === 0 ? '' : String(pieces.length));
      pieces.push(piece.slice());
      return String(pieces.length);
    };
    expect(await hashOf({ hashBytes }, data)).toBe('3');
    expect(Buffer.compare(Buffer.concat(pieces), data)).toBe(0);
  });
});

describe('data URLs', () => {
  const decoded = async (url: string, pieceChars?: number): Promise<string> => {
    const bytes = await decodeDataUrl(parseDataUrl(url), new Turns(1), pieceChars);
    return Buffer.from(bytes).toString('latin1');
  };

  test('base64 in pieces is what Buffer gives for the whole', async () => {
    const letter = fc.constantFrom(...'AQbz09+/-_= \n\t');
    const body = fc.oneof(
      fc.base64String({ maxLength: 60 }),
      fc.string({ unit: letter, maxLength: 40 }),
    );
    await fc.assert(
      fc.asyncProperty(body, fc.integer({ min: 1, max: 17 }), async (text, pieceChars) => {
        const wanted = Buffer.from(text, 'base64').toString('latin1');
        expect(await decoded(`data:;base64,${text}`, pieceChars)).toBe(wanted);
        const escaped = encodeURIComponent(text);
        expect(await decoded(`data:;base64,${escaped}`, pieceChars)).toBe(wanted);
      }),
    );
  });

  test('escaped bytes in pieces are those of the whole', async () => {
    const bytes = fc.uint8Array({ maxLength: 30 });
    await fc.assert(
      fc.asyncProperty(bytes, fc.integer({ min: 1, max: 7 }), async (data, pieceChars) => {
        const latin = Buffer.from(data).toString('latin1');
        const escaped = [...latin].map((each, i) =>
          i % 3 === 0 && each !== '%' ? each : `%${Buffer.from(each, 'latin1').toString('hex')}`,
        );
        expect(await decoded(`data:,${escaped.join('')}`, pieceChars)).toBe(latin);
      }),
    );
  });

  test.each(['QUJ§', 'QQ==§', '§', 'QUJD\u0120', 'QUJDQUJ\u{1F600}'])(
    '%s is refused in any pieces',
    async (text) => {
      for (const pieceChars of [1, 3, 4, 100]) {
        await expect(decoded(`data:;base64,${text}`, pieceChars)).rejects.toThrow('malformed');
      }
    },
  );

  test('tens of megabytes leave the event loop turns', async () => {
    let turns = 0;
    const count = setInterval(() => {
      turns += 1;
    }, 0);
    const text = Buffer.alloc(12e6, 'abc').toString('base64');
    expect((await decoded(`data:;base64,${text}`)).length).toBe(12e6);
    expect((await decoded(`data:;base64,${text.replace(/.{76}/g, '$&\n')}`)).length).toBe(12e6);
    clearInterval(count);
    expect(turns).toBeGreaterThan(1);
  });
});

describe('refusals', () => {
  async function code(source: ImageSource, limits: Partial<ImageLimits> = {}): Promise<string> {
    const error: unknown = await load(source, limits).then(
      () => 'loaded',
      (reason: unknown) => reason,
    );
    if (!(error instanceof Error) || !('code' in error)) return String(error);
    return `${error.code} ${error.message}`;
  }

  test.each([
    ['a missing file', '/no/such.png', 'ENOENT'],
    ['a folder', tmpdir(), 'not a file'],
    ['a device', '/dev/zero', 'not a file'],
    ['text', Buffer.from('hello'), 'cannot be decoded'],
    ['nothing', new Uint8Array(), 'is empty'],
    ['a data URL without a comma', 'data:image/png;base64', 'no comma'],
    ['broken base64', 'data:image/png;base64,§§', 'malformed'],
    ['a broken percent', 'data:image/png,%4', 'two hex digits'],
    ['another scheme', new URL('ftp://host/a.png'), 'ftp: is not read'],
    [
      'an SVG',
      Buffer.from('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
      'svg is not read',
    ],
    [
      'raw pixels of a wrong length',
      { data: PIXELS, width: 3, height: 3, channels: 3 },
      'expected 27',
    ],
    ['raw pixels of no size', { data: PIXELS, width: 0, height: 2, channels: 3 }, 'not a size'],
  ] as [string, ImageSource, string][])('%s', async (_, source, text) => {
    const answer = await code(source);
    expect(answer).toContain('ERR_TM_INVALID_IMAGE');
    expect(answer).toContain(text);
  });

  test('a truncated picture', async () => {
    const noise = Uint8Array.from({ length: 90 * 90 * 3 }, (_, i) => (i * 7919) % 251);
    const jpeg = await sharp(noise, { raw: { width: 90, height: 90, channels: 3 } })
      .jpeg()
      .toBuffer();
    expect(await code(jpeg)).toBe('loaded');
    expect(await code(jpeg.subarray(0, jpeg.length / 2))).toContain('ERR_TM_INVALID_IMAGE');
    expect(await code(png.subarray(0, png.length - 20))).toContain('ERR_TM_INVALID_IMAGE');
  });

  test('a decompression bomb, before it is decoded', async () => {
    const bomb = await sharp({
      create: { width: 2000, height: 2000, channels: 3, background: 'red' },
    })
      .png()
      .toBuffer();
    expect(bomb.length).toBeLessThan(LIMITS.maxBytes);
    const answer = await code(bomb);
    expect(answer).toContain('2000 x 2000');
    expect(answer).toContain('maxImagePixels');
    expect(await code(sharp(bomb))).toContain('maxImagePixels');
  });

  test('a file above the byte limit', async () => {
    expect(await code(join(folder, 'a b.png'), { maxBytes: 10 })).toContain('maxBytes');
    expect(await code(`data:;base64,${png.toString('base64')}`, { maxBytes: 10 })).toContain(
      'maxBytes',
    );
  });

  test.each([
    ['/none', 'status 404'],
    ['/hop/9', 'more than 5 redirects'],
    ['/file', 'redirected to file:'],
    ['/big', 'maxBytes'],
  ])('%s over HTTP', async (path, text) => {
    const answer = await code(`${origin}${path}`);
    expect(answer).toContain('ERR_TM_IMAGE_FETCH');
    expect(answer).toContain(text);
  });

  test('a server that does not answer, and a caller that gives up', async () => {
    expect(await code(`${origin}/hang`, { timeoutMs: 50 })).toContain('no answer within 50 ms');
    const controller = new AbortController();
    const loading = load(`${origin}/hang`, {}, controller.signal);
    controller.abort(new Error('enough'));
    await expect(loading).rejects.toThrow('enough');
    expect(await code('http://127.0.0.1:1/a.png')).toContain('ERR_TM_IMAGE_FETCH');
  });
});
