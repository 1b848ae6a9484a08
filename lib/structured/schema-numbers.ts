// The numbers that a schema's minimum, maximum and multipleOf leave. Pure functions.
import {
  ANY_NUMBER,
  integersBetween,
  type NumberBounds,
  numbersBetween,
  UNBOUNDED,
} from './numbers.js';
import { choice, type Pattern, text } from './pattern.js';
import { type SchemaObject, schemaError } from './schema.js';

/** More multiples than these are not written out one by one. */
const MAX_MULTIPLES = 1000;

/** @throws TurbomindError ERR_TM_INVALID_OPTION when none is left, or the keywords are not promised. */
export function numberPattern(
  type: 'number' | 'integer',
  schema: SchemaObject,
  path: string,
): Pattern {
  const bounds = boundsOf(schema, path);
  const step = numberAt(schema, 'multipleOf', path);
  const isBounded = bounds !== UNBOUNDED;
  if (step !== undefined && !(step > 0)) throw schemaError(path, 'multipleOf must be above 0');
  const digits = step === undefined ? undefined : decimalPlaces(step);
  let found: Pattern | undefined;
  if (type === 'integer' && (step === undefined || Number.isInteger(1 / step))) {
    found = integersBetween(bounds);
  } else if (step === undefined) {
    found = isBounded ? numbersBetween(bounds) : ANY_NUMBER;
  } else if (type === 'number' && digits !== undefined) {
    found = digits === 0 ? integersBetween(bounds) : numbersBetween(bounds, digits);
  } else {
    found = multiplesBetween(step, type, bounds, path);
  }
  if (found === undefined) throw schemaError(path, 'no number lies between its bounds');
  return found;
}

// 1, 0.1, 0.01…: that many places behind the point, and nothing else.
function decimalPlaces(step: number): number | undefined {
  const places = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].find((count) => Number(`1e-${count}`) === step);
  return places;
}

function multiplesBetween(
  step: number,
  type: 'number' | 'integer',
  bounds: NumberBounds,
  path: string,
): Pattern {
  const first = Math.ceil(bounds.min / step);
  const last = Math.floor(bounds.max / step);
  if (!(last - first < MAX_MULTIPLES) || !Number.isInteger(step)) {
    throw schemaError(
      path,
      `multipleOf ${step} is supported for powers of ten up to 1, and for whole numbers with ` +
        `minimum and maximum that leave at most ${MAX_MULTIPLES} values (type ${type})`,
    );
  }
  const values = Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
  const inside = values.filter(
    (value) =>
      !(bounds.isMinExclusive && value === bounds.min) &&
      !(bounds.isMaxExclusive && value === bounds.max),
  );
  return choice(...inside.map((value) => text(String(value === 0 ? 0 : value))));
}

function boundsOf(schema: SchemaObject, path: string): NumberBounds {
  const min = numberAt(schema, 'minimum', path);
  const max = numberAt(schema, 'maximum', path);
  const above = numberAt(schema, 'exclusiveMinimum', path);
  const below = numberAt(schema, 'exclusiveMaximum', path);
  if ([min, max, above, below].every((bound) => bound === undefined)) return UNBOUNDED;
  const isMinExclusive = above !== undefined && (min === undefined || above >= min);
  const isMaxExclusive = below !== undefined && (max === undefined || below <= max);
  return {
    min: (isMinExclusive ? above : min) ?? Number.NEGATIVE_INFINITY,
    isMinExclusive,
    max: (isMaxExclusive ? below : max) ?? Number.POSITIVE_INFINITY,
    isMaxExclusive,
  };
}

function numberAt(schema: SchemaObject, key: string, path: string): number | undefined {
  const value = schema[key];
  if (value === undefined || typeof value === 'number') return value;
  throw schemaError(path, `${key} must be a number`);
}
