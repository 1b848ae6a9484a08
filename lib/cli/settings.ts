// The flags that run and chat share, and their way into options. The library checks ranges; here
// texts become numbers. Pure functions.
import { type Command, InvalidArgumentError } from 'commander';
import type { Device } from '../device.js';
import type { GenerationOptions, PipelineOptions } from '../options.js';

/** Parsed flags of run and chat. */
export interface ModelFlags {
  readonly device?: Device;
  readonly threads?: number;
  readonly sessionLen?: number;
  readonly maxNewTokens?: number;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly seed?: number;
  readonly stop?: readonly string[];
  readonly system?: string;
}

export function addModelFlags(command: Command): Command {
  return command
    .option('--device <device>', "'auto', 'cpu', 'cuda' or 'cuda:N'", parseDevice)
    .option('--threads <n>', 'CPU threads (default: all)', parseNumber)
    .option('--session-len <n>', 'most tokens of prompt and completion', parseNumber)
    .option('--max-new-tokens <n>', 'most tokens of an answer', parseNumber)
    .option('--temperature <t>', 'above 0: draw tokens at random; 0: always the best', parseNumber)
    .option('--top-k <n>', 'draw among the n best tokens', parseNumber)
    .option('--top-p <p>', 'draw among the best tokens of this joint probability', parseNumber)
    .option('--seed <n>', 'seed of the draws', parseNumber)
    .option('--stop <text>', 'end the answer before this text (repeatable)', append)
    .option('--system <text>', 'system prompt');
}

export function parseNumber(text: string): number {
  const value = Number(text);
  if (text.trim() === '' || !Number.isFinite(value))
    throw new InvalidArgumentError('not a number.');
  return value;
}

export function append(text: string, before: readonly string[] = []): string[] {
  return [...before, text];
}

export function toPipelineOptions(flags: ModelFlags): PipelineOptions {
  return { device: flags.device, threads: flags.threads, sessionLen: flags.sessionLen };
}

// A flag that only matters for draws asks for draws.
export function toGenerationOptions(flags: ModelFlags): GenerationOptions {
  const { maxNewTokens, temperature, topK, topP, seed, stop } = flags;
  const wantsDraws = [temperature, topK, topP, seed].some((value) => value !== undefined);
  const sampling =
    wantsDraws && temperature !== 0
      ? { doSample: true, temperature, topK, topP, randomSeed: seed }
      : {};
  return { maxNewTokens, stopWords: stop, ...sampling };
}

function parseDevice(text: string): Device {
  if (text === 'auto' || text === 'cpu' || text === 'cuda') return text;
  const match = /^cuda:(\d+)$/.exec(text);
  if (match === null) throw new InvalidArgumentError("not 'auto', 'cpu', 'cuda' or 'cuda:N'.");
  return `cuda:${Number(match[1])}`;
}
