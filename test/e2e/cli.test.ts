// The command line as a user meets it: output, exit statuses, interrupts, closed pipes.
import { spawn } from 'node:child_process';
import { describe, expect, test } from 'vitest';
import { cli, embedded, fixture, root, runNode } from './support/paths.js';

const PICTURE = fixture('10-shapes-224x224.png');
const QUESTION = 'What colour is the largest shape?';

function run(...args: string[]) {
  return runNode([cli, ...args]);
}

describe('run', () => {
  test('--json prints exactly one JSON object', async () => {
    const { stdout, code } = await run('run', '--prompt', QUESTION, '--image', PICTURE, '--json');
    expect(code).toBe(0);
    expect(stdout.trimEnd().split('\n')).toHaveLength(1);
    const answer = JSON.parse(stdout);
    expect(answer).toMatchObject({ text: 'orange', finishReason: 'stop' });
    expect(Object.keys(answer)).toEqual([
      'text',
      'tokenIds',
      'finishReason',
      'matchedStop',
      'usage',
      'timings',
    ]);
    const { promptTokens, completionTokens, totalTokens } = answer.usage;
    expect(completionTokens).toBe(answer.tokenIds.length);
    expect(totalTokens).toBe(promptTokens + completionTokens);
    expect(answer.timings.firstTokenMs).toBeGreaterThan(0);
  });

  test('streams the text alone to stdout and the counts to stderr', async () => {
    const { stdout, stderr, code } = await run('run', embedded, '--prompt', 'What is 27 + 45?');
    expect({ stdout, code }).toEqual({ stdout: '72\n', code: 0 });
    expect(stderr).toContain('prompt +');
    expect(stderr).not.toContain('█'); // no bar without a terminal
  });

  test('reads the question from standard input', async () => {
    const { stdout } = await runNode([cli, 'run'], { input: 'What is 27 + 45?\n' });
    expect(stdout).toBe('72\n');
  });

  test('takes generation flags', async () => {
    const { stdout } = await run('run', '-p', 'Hello!', '--max-new-tokens', '3', '--json');
    expect(JSON.parse(stdout)).toMatchObject({
      finishReason: 'length',
      usage: { completionTokens: 3 },
    });
    const flags = ['-p', 'Hello!', '--temperature', '1.5', '--seed', '3', '--json'];
    const [a, b] = await Promise.all([run('run', ...flags), run('run', ...flags)]);
    expect(JSON.parse(a.stdout).tokenIds).toEqual(JSON.parse(b.stdout).tokenIds);
    const stopped = await run('run', '-p', 'Hello!', '--stop', ' can', '--json');
    expect(JSON.parse(stopped.stdout)).toMatchObject({ text: 'Hello! How', matchedStop: ' can' });
  });

  test.each([
    [['run', '--image', '/no/such.png', '--prompt', 'a'], 1, 'ERR_TM_INVALID_IMAGE'],
    [['run', '/no/such/model', '--prompt', 'a'], 1, 'ERR_TM_MODEL_NOT_FOUND'],
    [['run', '--prompt', 'a', '--temperature', '9'], 1, 'ERR_TM_INVALID_OPTION'],
    [['run', '--prompt', 'a', '--device', 'cuda'], 1, 'ERR_TM_UNSUPPORTED_DEVICE'],
    [['run', '--prompt', 'a', '--max-new-tokens', 'x'], 2, 'not a number'],
    [['run', '--promt', 'a'], 2, 'Did you mean --prompt'],
    [['rum'], 2, 'Did you mean run'],
  ] as [string[], number, string][])(
    '%j fails with %i and says why',
    async (args, status, text) => {
      const { stdout, stderr, code } = await run(...args);
      expect({ stdout, code }).toEqual({ stdout: '', code: status });
      expect(stderr).toContain(text);
      expect(stderr).not.toContain('    at '); // no stack
    },
  );

  test('an interrupt ends it with 130', async () => {
    const args = ['run', '-p', 'Tell me a long story.', '--max-new-tokens', '4000'];
    const { code, signal } = await runNode([cli, ...args], {
      onOutput: (child) => child.kill('SIGINT'),
    });
    expect(signal).toBeNull();
    expect([0, 130]).toContain(code); // 0: the answer was complete before the signal came
  });

  test('a reader that goes away is no error', async () => {
    const child = spawn('sh', ['-c', `"${process.execPath}" "${cli}" inspect | true`], {
      cwd: root,
    });
    let stderr = '';
    child.stderr.on('data', (text) => {
      stderr += text;
    });
    await new Promise((resolve) => child.on('close', resolve));
    expect(stderr).toBe('');
  });
});

describe('chat', () => {
  test('keeps the conversation, takes pictures, leaves at the end of input', async () => {
    const input = `Hello!\n/image ${PICTURE}\n${QUESTION}\n/clear\nWhat is 27 + 45?\n/exit\n`;
    const { stdout, code } = await runNode([cli, 'chat'], { input });
    expect(stdout.split('\n')).toEqual(['Hello! How can I help you?', 'orange', '72', '']);
    expect(code).toBe(0);
  });

  test('an error of one question does not end it', async () => {
    const input = `/image /no/such.png\nWhat is this?\nWhat is 27 + 45?\n`;
    const { stdout, stderr, code } = await runNode([cli, 'chat'], { input });
    expect(stderr).toContain('ERR_TM_INVALID_IMAGE');
    expect(stdout).toContain('72\n');
    expect(code).toBe(0);
  });
});

describe('inspect and doctor', () => {
  test('inspect tells what the folder holds and needs', async () => {
    const { stdout, code } = await run('inspect', '--json', '--session-len', '1000');
    expect(code).toBe(0);
    const report = JSON.parse(stdout);
    expect(report.architecture).toBe('InternVLForConditionalGeneration');
    // 6 layers, 2 KV heads of 64, keys and values, 4 bytes; 16 blocks of 64 tokens.
    expect(report.memory.kvBytesPerToken).toBe(6 * 2 * 64 * 2 * 4);
    expect(report.memory.kvBytesPerSession).toBe(1024 * 6144);
    expect((await run('inspect')).stdout).toContain('memory needed');
    const refused = await run('inspect', '--session-len', '-5');
    expect(refused).toMatchObject({ code: 1, stdout: '' });
    expect(refused.stderr).toContain('sessionLen: -5');
  });

  test('doctor names CPU, binaries and GPU', async () => {
    const { stdout, code } = await run('doctor', '--json');
    expect(code).toBe(0);
    const report = JSON.parse(stdout);
    expect(report.addon.path).toMatch(/\.node$/);
    expect(report.cpu.isa).toMatch(/scalar|avx2|avx512|amx/);
    expect(report.memory.totalBytes).toBeGreaterThan(0);
    expect((await run('doctor')).stdout).toContain('instruction set');
  });

  test('doctor without a binary lists the attempts and fails', async () => {
    const env = { TURBOMIND_NATIVE: '/no/such.node' };
    const { stdout, code } = await runNode([cli, 'doctor', '--json'], { env });
    expect(code).toBe(1);
    expect(JSON.parse(stdout).addon).toEqual({
      path: null,
      attempts: [{ path: '/no/such.node', reason: 'the file does not exist' }],
    });
  });
});

test('help and version', async () => {
  expect((await run('--version')).stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
  const { stdout, code } = await run('--help');
  expect(code).toBe(0);
  for (const command of ['run', 'chat', 'inspect', 'doctor']) expect(stdout).toContain(command);
});
