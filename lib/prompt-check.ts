// How values of prompts are checked and named in errors: texts, keys, and what a wrong value is called.
// Pure functions.
import type { JsonObject } from './checkpoint/json.js';
import { TurbomindError } from './errors.js';

/** @returns ERR_TM_INVALID_PROMPT */
export function invalidPrompt(message: string): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_PROMPT', `invalid prompt: ${message}`);
}

/** A text that is not empty. @throws TurbomindError ERR_TM_INVALID_PROMPT */
export function readText(value: unknown, where: string): string {
  if (typeof value !== 'string') {
    throw invalidPrompt(`${where} is ${describe(value)}; expected a string`);
  }
  if (value.trim() === '') throw invalidPrompt(`${where} is empty; a prompt needs some text`);
  return wellFormed(value, where);
}

/** Half a surrogate pair has no UTF-8 form, so no tokenizer can carry it. */
export function wellFormed(text: string, where: string): string {
  if (LONE_SURROGATE.test(text)) {
    throw invalidPrompt(`${where} holds half a surrogate pair; it was cut inside a character`);
  }
  return text;
}

const LONE_SURROGATE = /\p{Surrogate}/u;

/** @throws TurbomindError ERR_TM_INVALID_PROMPT */
export function rejectUnknownKeys(
  value: JsonObject,
  known: readonly string[],
  where: string,
): void {
  const unknown = Object.keys(value).find((key) => !known.includes(key));
  if (unknown !== undefined) {
    throw invalidPrompt(
      `${where} has an unknown key ${quote(unknown)}; known keys: ${quoteList(known)}`,
    );
  }
}

/** What a value is called in an error. */
export function describe(value: unknown): string {
  if (value === null || value === undefined) return `${value}`;
  if (typeof value === 'string') return value === '' ? 'an empty string' : quote(value);
  if (typeof value === 'number' || typeof value === 'boolean') return `${value}`;
  if (Array.isArray(value)) return 'an array';
  return `a value of type ${typeof value}`;
}

function quote(text: string): string {
  const short = text.length > 40 ? `${text.slice(0, 40)}…` : text;
  return `'${short}'`;
}

export function quoteList(names: readonly string[]): string {
  return names.map(quote).join(', ');
}
