#!/usr/bin/env node
// The command line: commands, flags, exit statuses. Each command is one file, loaded when asked
// for, so that --help is instant. Runs on the main thread.
import { Command, CommanderError } from 'commander';
import { packageVersion } from '../native.js';
import type { InspectFlags } from './inspect.js';
import { describeError, EXIT, installPipeGuard, log, UsageError } from './output.js';
import type { RunFlags } from './run.js';
import { addModelFlags, append, type ModelFlags, parseNumber } from './settings.js';

function build(): Command {
  const program = new Command('turbomind-node')
    .description('Run LLMs and vision-language models inside Node.js.')
    .version(packageVersion())
    .exitOverride();
  const model = ['[model]', 'model folder (default: the small model that comes along)'] as const;
  addModelFlags(
    program
      .command('run')
      .description('answer one prompt')
      .argument(...model),
  )
    .option('-p, --prompt <text>', "the question; '-' or none: read it from standard input")
    .option('-i, --image <source>', 'picture: path, URL or data URL (repeatable)', append)
    .option('--json', 'print one JSON object')
    .action(async (folder: string | undefined, flags: RunFlags) =>
      (await import('./run.js')).run(folder, flags),
    );
  addModelFlags(
    program
      .command('chat')
      .description('talk, with history')
      .argument(...model),
  ).action(async (folder: string | undefined, flags: ModelFlags) =>
    (await import('./chat.js')).chat(folder, flags),
  );
  program
    .command('inspect')
    .description('what a model folder holds and the memory it will need')
    .argument(...model)
    .option('--session-len <n>', 'tokens of the session to plan for', parseNumber)
    .option('--json', 'print one JSON object')
    .action(async (folder: string | undefined, flags: InspectFlags) =>
      (await import('./inspect.js')).inspect(folder, flags),
    );
  program
    .command('doctor')
    .description('CPU, GPU, drivers, and which binaries load')
    .option('--json', 'print one JSON object')
    .action(async (flags: { json?: boolean }) => (await import('./doctor.js')).doctor(flags));
  return program;
}

async function main(): Promise<void> {
  installPipeGuard();
  try {
    await build().parseAsync();
  } catch (error) {
    if (error instanceof CommanderError) {
      process.exitCode = error.exitCode === 0 ? 0 : EXIT.usage; // commander has said why
      return;
    }
    log(describeError(error));
    process.exitCode = error instanceof UsageError ? EXIT.usage : EXIT.failed;
  }
}

void main();
