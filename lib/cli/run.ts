// `turbomind-node run`: one prompt, one answer. Text streams to stdout; with --json exactly one
// JSON object does. Runs on the main thread.
import { text as readAll } from 'node:stream/consumers';
import type { ChatMessageInput, ContentPartInput } from '../messages.js';
import { pipeline } from '../open-pipeline.js';
import type { Pipeline } from '../pipeline.js';
import type { Response } from '../response.js';
import { EXIT, log, printJson, progressBar, UsageError } from './output.js';
import { type ModelFlags, toGenerationOptions, toPipelineOptions } from './settings.js';

export interface RunFlags extends ModelFlags {
  readonly prompt?: string;
  readonly image?: readonly string[];
  readonly json?: boolean;
}

export async function run(model: string | undefined, flags: RunFlags): Promise<void> {
  const messages = toMessages(await readPrompt(flags), flags);
  // The picture decoder loads while the weights do; if it cannot, the first picture says why.
  if (flags.image !== undefined) void import('sharp').catch(() => undefined);
  const interrupt = new AbortController();
  const onSigint = (): void => interrupt.abort();
  process.once('SIGINT', onSigint);
  try {
    const onProgress = progressBar('Loading');
    const settings = { ...toPipelineOptions(flags), onProgress, signal: interrupt.signal };
    await using pipe = await pipeline(model, settings);
    const options = { ...toGenerationOptions(flags), signal: interrupt.signal };
    if (flags.json) printJson(toJson(await pipe(messages, options)));
    else await printStream(pipe, messages, options);
  } catch (error) {
    if (!interrupt.signal.aborted) throw error;
    process.exitCode = EXIT.interrupted;
  } finally {
    process.removeListener('SIGINT', onSigint);
  }
}

async function readPrompt(flags: RunFlags): Promise<string> {
  if (flags.prompt !== undefined && flags.prompt !== '-') return flags.prompt;
  if (flags.prompt === undefined && process.stdin.isTTY === true) {
    throw new UsageError("error: --prompt is missing; '--prompt -' reads it from the terminal");
  }
  return (await readAll(process.stdin)).trimEnd();
}

function toMessages(prompt: string, flags: RunFlags): ChatMessageInput[] {
  const pictures = (flags.image ?? []).map((image) => ({ type: 'image', image }) as const);
  const content: ContentPartInput[] = [...pictures, { type: 'text', text: prompt }];
  const system =
    flags.system === undefined ? [] : [{ role: 'system', content: flags.system } as const];
  return [...system, { role: 'user', content }];
}

async function printStream(
  pipe: Pipeline,
  messages: readonly ChatMessageInput[],
  options: Parameters<Pipeline['stream']>[1],
): Promise<void> {
  for await (const part of pipe.stream(messages, options)) {
    process.stdout.write(part.text);
    if (part.response !== undefined) {
      process.stdout.write('\n');
      log(summary(part.response));
    }
  }
}

/** Counts and times of an answer, in one line. */
export function summary(response: Response): string {
  const { timings, inputTokenLen, generateTokenLen, finishReason } = response;
  const rate = (generateTokenLen - 1) / (timings.decodeMs / 1000);
  const speed = generateTokenLen > 1 && timings.decodeMs > 0 ? `, ${rate.toFixed(0)} tok/s` : '';
  return (
    `[${inputTokenLen} prompt + ${generateTokenLen} new tokens, ${finishReason}; ` +
    `pictures and tokens ${timings.preprocessMs.toFixed(0)} ms, vision ${timings.visionMs.toFixed(0)} ms, ` +
    `prefill ${timings.prefillMs.toFixed(0)} ms, decode ${timings.decodeMs.toFixed(0)} ms${speed}]`
  );
}

function toJson(response: Response): object {
  const { text, tokenIds, finishReason, matchedStop, timings } = response;
  const { inputTokenLen, generateTokenLen } = response;
  return {
    text,
    tokenIds,
    finishReason,
    matchedStop: matchedStop ?? null,
    usage: {
      promptTokens: inputTokenLen,
      completionTokens: generateTokenLen,
      totalTokens: inputTokenLen + generateTokenLen,
    },
    timings,
  };
}
