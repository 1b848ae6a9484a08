// JSON strings under minLength, maxLength, pattern and format. A pattern or format and a length
// together need the pattern to keep the length by itself: their intersection is not computed.
// Pure functions.
import { ANY } from './char-set.js';
import { FORMATS, formatPattern } from './formats.js';
import { asJsonString, lengthOf, type Pattern, repeat, sequence, set } from './pattern.js';
import { parseRegex } from './regex.js';
import { type SchemaObject, schemaError } from './schema.js';

const MAX_LENGTH = 100_000;

export function stringPattern(schema: SchemaObject, path: string): Pattern {
  const min = lengthAt(schema, 'minLength', path) ?? 0;
  const max = lengthAt(schema, 'maxLength', path) ?? Number.POSITIVE_INFINITY;
  if (min > max) throw schemaError(path, `minLength ${min} is above maxLength ${max}`);
  const content = contentOf(schema, path);
  if (content === undefined) return quoted(repeat(set(ANY), min, max));
  const length = lengthOf(content);
  if (length.min < min || length.max > max) {
    throw schemaError(
      path,
      `pattern or format gives ${length.min} to ${length.max} characters, minLength and maxLength ` +
        'ask for others; bound the repetitions of the pattern instead',
    );
  }
  return quoted(content);
}

function quoted(content: Pattern): Pattern {
  return sequence('"', asJsonString(content), '"');
}

function contentOf(schema: SchemaObject, path: string): Pattern | undefined {
  const { pattern, format } = schema;
  if (pattern !== undefined && format !== undefined) {
    throw schemaError(path, 'pattern and format together are not supported; choose one');
  }
  if (pattern !== undefined) return patternAt(pattern, path);
  if (format === undefined) return undefined;
  const known = typeof format === 'string' ? formatPattern(format) : undefined;
  if (known !== undefined) return known;
  const shown = JSON.stringify(format);
  throw schemaError(
    path,
    `format ${shown} is not supported; expected ${FORMATS.join(', ')}, or use pattern`,
  );
}

/** The pattern keyword's texts. */
export function patternAt(pattern: unknown, path: string): Pattern {
  if (typeof pattern !== 'string') throw schemaError(path, 'pattern must be a text');
  try {
    return parseRegex(pattern);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw schemaError(path, `pattern ${JSON.stringify(pattern)} ${reason}`);
  }
}

function lengthAt(schema: SchemaObject, key: string, path: string): number | undefined {
  const value = schema[key];
  if (value === undefined) return undefined;
  const isCount = typeof value === 'number' && Number.isInteger(value) && value >= 0;
  if (!isCount) throw schemaError(path, `${key} must be a whole number from 0 on`);
  if (value <= MAX_LENGTH) return value;
  const remedy = key === 'maxLength' ? '; leave it out' : '';
  throw schemaError(path, `${key} ${value} is above the limit of ${MAX_LENGTH}${remedy}`);
}
