// Bad input: each a typed error with a code, and the pipeline and its other requests go on.
import { cpSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type GenerationOptions, type Pipeline, pipeline } from '../../lib/index.js';
import { embedded, fixture, runModule } from './support/paths.js';

const scratch = mkdtempSync(join(tmpdir(), 'turbomind-errors-'));
let pipe: Pipeline;
let count = 0;

beforeAll(async () => {
  pipe = await pipeline({ device: 'cpu', sessionLen: 1024 });
});
afterAll(async () => {
  await pipe?.close();
  rmSync(scratch, { recursive: true });
});

function copyModel(change: (folder: string) => void): string {
  const folder = join(scratch, String(count++));
  cpSync(embedded, folder, { recursive: true });
  change(folder);
  return folder;
}

type Json = Record<string, unknown>;

function editJson(file: string, edit: (json: Json) => void): (folder: string) => void {
  return (folder) => {
    const json: Json = JSON.parse(readFileSync(join(folder, file), 'utf8'));
    edit(json);
    writeFileSync(join(folder, file), JSON.stringify(json));
  };
}

function child(json: Json, key: string): Json {
  const value = json[key];
  if (typeof value !== 'object' || value === null) throw new Error(`${key} is no object`);
  return Object.fromEntries(Object.entries(value));
}

// Rewrites the header of the weights, keeping the data where it is.
function editHeader(edit: (header: Record<string, Json>) => void): (folder: string) => void {
  return (folder) => {
    const path = join(folder, 'model.safetensors');
    const bytes = readFileSync(path);
    const length = Number(bytes.readBigUInt64LE(0));
    const header: Record<string, Json> = JSON.parse(bytes.toString('utf8', 8, 8 + length));
    edit(header);
    const text = Buffer.from(JSON.stringify(header));
    const size = Buffer.alloc(8);
    size.writeBigUInt64LE(BigInt(text.length));
    writeFileSync(path, Buffer.concat([size, text, bytes.subarray(8 + length)]));
  };
}

function firstTensor(header: Record<string, Json>, pattern: RegExp): string {
  const name = Object.keys(header).find((key) => pattern.test(key));
  if (name === undefined) throw new Error(`no tensor matches ${pattern}`);
  return name;
}

describe('model folders', () => {
  test.each([
    ['that do not exist', () => '/no/such/folder', /ERR_TM_MODEL_NOT_FOUND/],
    [
      'of an unknown architecture',
      () =>
        copyModel(
          editJson('config.json', (json) => Object.assign(json, { architectures: ['Nobody'] })),
        ),
      /ERR_TM_UNSUPPORTED_MODEL.*Nobody/,
    ],
    [
      'whose config.json is no JSON',
      () => copyModel((folder) => writeFileSync(join(folder, 'config.json'), '{')),
      /ERR_TM_INVALID_CONFIG/,
    ],
    [
      'with absurd sizes',
      () =>
        copyModel(
          editJson('config.json', (json) => {
            json.text_config = { ...child(json, 'text_config'), num_hidden_layers: 1e9 };
          }),
        ),
      /ERR_TM_INVALID_CONFIG|ERR_TM_MISSING_TENSOR/,
    ],
    [
      'with heads that do not divide',
      () =>
        copyModel(
          editJson('config.json', (json) => {
            json.text_config = { ...child(json, 'text_config'), num_key_value_heads: 4 };
          }),
        ),
      /ERR_TM_(INVALID_CONFIG|TENSOR_MISMATCH|UNSUPPORTED_MODEL)/,
    ],
    [
      'with a quantisation that is not there',
      () =>
        copyModel(
          editJson('config.json', (json) => {
            json.quantization_config = { ...child(json, 'quantization_config'), bits: 3 };
          }),
        ),
      /ERR_TM_UNSUPPORTED_QUANTIZATION/,
    ],
    [
      'with truncated weights',
      () => copyModel((folder) => truncateSync(join(folder, 'model.safetensors'), 1_000_000)),
      /ERR_TM_INVALID_CHECKPOINT/,
    ],
    [
      'with a header longer than the file',
      () =>
        copyModel((folder) =>
          writeFileSync(join(folder, 'model.safetensors'), Buffer.alloc(16, 0x7f)),
        ),
      /ERR_TM_INVALID_CHECKPOINT/,
    ],
    [
      'with overlapping tensors',
      () =>
        copyModel(
          editHeader((header) => {
            const names = Object.keys(header).filter((name) => /qweight$/.test(name));
            const [a = '', b = ''] = names;
            const from = header[a];
            const to = header[b];
            if (from !== undefined && to !== undefined) to.data_offsets = from.data_offsets;
          }),
        ),
      /ERR_TM_(INVALID_CHECKPOINT|TENSOR_MISMATCH)/,
    ],
    [
      'with a missing tensor',
      () =>
        copyModel(
          editHeader((header) => {
            const name = firstTensor(header, /q_proj\.qweight$/);
            header[`${name}.renamed`] = header[name] ?? {};
            delete header[name];
          }),
        ),
      /ERR_TM_MISSING_TENSOR/,
    ],
    [
      'with a tensor of another shape',
      () =>
        copyModel(
          editHeader((header) => {
            const tensor = header[firstTensor(header, /q_proj\.qweight$/)];
            if (tensor !== undefined && Array.isArray(tensor.shape))
              tensor.shape = tensor.shape.reverse();
          }),
        ),
      /ERR_TM_TENSOR_MISMATCH/,
    ],
    [
      'without a tokenizer',
      () => copyModel((folder) => rmSync(join(folder, 'tokenizer.json'))),
      /ERR_TM_INVALID_TOKENIZER/,
    ],
    [
      'with a broken chat template',
      () => copyModel((folder) => writeFileSync(join(folder, 'chat_template.jinja'), '{% for %}')),
      /ERR_TM_INVALID_TEMPLATE/,
    ],
  ] as [string, () => string, RegExp][])('%s', async (_, make, pattern) => {
    const folder = make();
    const answer = await pipeline(folder, { device: 'cpu' }).then(
      async (opened) => {
        await opened.close();
        return 'it opened';
      },
      (error: unknown) =>
        error instanceof Error && 'code' in error
          ? `${error.code} ${error.message}`
          : String(error),
    );
    expect(answer).toMatch(pattern);
  });
});

describe('requests', () => {
  test.each([
    ['an empty prompt', '', {}, 'ERR_TM_INVALID_PROMPT'],
    ['a prompt above the session', 'x'.repeat(2000), {}, 'ERR_TM_PROMPT_TOO_LONG'],
    ['an unknown option', 'Hello!', { max_new_tokens: 1 }, 'ERR_TM_INVALID_OPTION'],
    [
      'a stop id beyond the vocabulary',
      'Hello!',
      { stopTokenIds: [99_999] },
      'ERR_TM_INVALID_OPTION',
    ],
  ] as [string, string, GenerationOptions, string][])('%s', async (_, prompt, options, code) => {
    await expect(pipe(prompt, options)).rejects.toMatchObject({ name: 'TurbomindError', code });
    expect((await pipe('What is 27 + 45?')).text).toBe('72');
  });

  test('a corrupt picture while others run', async () => {
    const running = pipe('Hello!');
    const corrupt = readFileSync(fixture('11-shapes-900x440.jpg')).subarray(0, 3000);
    const asked = pipe({ text: 'What is this?', images: [corrupt] });
    await expect(asked).rejects.toMatchObject({ code: 'ERR_TM_INVALID_IMAGE' });
    expect((await running).text).toBe('Hello! How can I help you?');
  });

  test('a closed pipeline', async () => {
    const other = await pipeline({ device: 'cpu', sessionLen: 256 });
    const running = other('Hello!', { ignoreEos: true, maxNewTokens: 200 });
    const rejected = expect(running).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
    await Promise.all([other.close(), other.close()]);
    await rejected;
    await expect(other('Hello!')).rejects.toMatchObject({ code: 'ERR_TM_DISPOSED' });
  });
});

describe('devices and binaries', () => {
  test('a GPU by name is refused with reasons', async () => {
    await expect(pipeline({ device: 'cuda' })).rejects.toMatchObject({
      code: 'ERR_TM_UNSUPPORTED_DEVICE',
    });
  });

  test('more memory than there is', async () => {
    const options = { device: 'cpu', cacheMaxEntryCount: 1e-9 } as const;
    await expect(pipeline(options)).rejects.toMatchObject({ code: 'ERR_TM_OUT_OF_MEMORY' });
  });

  test('a binary that cannot be loaded is one typed error', async () => {
    const broken = join(scratch, 'broken.node');
    writeFileSync(broken, 'not a library');
    const { stdout } = await runModule(
      `import { pipeline, BackendNotFoundError } from LIB;
       const error = await pipeline().catch((each) => each);
       console.log(JSON.stringify({ is: error instanceof BackendNotFoundError, code: error.code,
         attempts: error.attempts }));`,
      { env: { TURBOMIND_NATIVE: broken } },
    );
    const answer = JSON.parse(stdout);
    expect(answer).toMatchObject({ is: true, code: 'ERR_TM_BACKEND_NOT_FOUND' });
    expect(answer.attempts).toHaveLength(1);
    expect(answer.attempts[0].path).toBe(broken);
  });
});
