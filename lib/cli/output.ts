// Where the command line writes: answers and JSON on stdout, everything else on stderr. A reader
// that goes away (`| head`) ends the program quietly. Runs on the main thread.
import { TurbomindError } from '../errors.js';

/** Exit statuses: 1 something failed, 2 wrong usage, 130 interrupted. */
export const EXIT = { failed: 1, usage: 2, interrupted: 130 } as const;

/** Wrong flags, found after parsing. */
export class UsageError extends Error {}

export function installPipeGuard(): void {
  for (const stream of [process.stdout, process.stderr]) {
    stream.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'EPIPE') process.exit(0);
      throw error;
    });
  }
}

export function log(line: string): void {
  process.stderr.write(`${line}\n`);
}

export function printJson(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

/** One line for a person: the code and what to do; the stack only when asked for. */
export function describeError(error: unknown): string {
  if (process.env.TURBOMIND_DEBUG && error instanceof Error) return error.stack ?? error.message;
  if (error instanceof TurbomindError) return `${error.code}: ${error.message}`;
  return error instanceof Error ? error.message : String(error);
}

const BAR_WIDTH = 30;

/** A loading bar on stderr, where a person watches; elsewhere undefined. */
export function progressBar(label: string): ((share: number) => void) | undefined {
  const { stderr } = process;
  if (stderr.isTTY !== true) return undefined;
  let shown = -1;
  return (share) => {
    const percent = Math.floor(Math.min(1, Math.max(0, share)) * 100);
    if (percent === shown) return;
    shown = percent;
    const filled = Math.round((percent / 100) * BAR_WIDTH);
    const bar = `${'█'.repeat(filled)}${'░'.repeat(BAR_WIDTH - filled)}`;
    stderr.write(percent === 100 ? '\r\x1b[2K' : `\r${label} ${bar} ${percent}%`);
  };
}

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'] as const;

export function formatBytes(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(value < 10 ? 2 : 1)} ${UNITS[unit]}`;
}

export function formatCount(count: number): string {
  if (count >= 1e9) return `${(count / 1e9).toFixed(2)} B`;
  if (count >= 1e6) return `${(count / 1e6).toFixed(1)} M`;
  return String(count);
}

/** Two columns, the first as wide as its longest entry. */
export function printRows(rows: readonly (readonly [label: string, value: string])[]): void {
  const width = Math.max(...rows.map(([label]) => label.length));
  for (const [label, value] of rows) process.stdout.write(`${label.padEnd(width)}  ${value}\n`);
}
