// Judges JSON values by a schema (the keywords of the fixtures, draft 2020-12), for tests and
// benchmarks of structured output. Written on its own, from the standard: it shares no code with
// lib/structured, so that a mistake there is not repeated here. An unknown keyword throws.

const IGNORED = new Set([
  '$schema',
  '$id',
  '$comment',
  '$defs',
  'definitions',
  'title',
  'description',
]);

/** What is wrong with the value: an empty list when it is valid. */
export function problemsOf(schema, value) {
  const problems = [];
  check(schema, value, '', { root: schema, problems });
  return problems;
}

function check(schema, value, path, context) {
  if (schema === true) return;
  if (schema === false) return context.problems.push(`${path}: nothing is allowed here`);
  for (const [keyword, rule] of Object.entries(schema)) {
    if (IGNORED.has(keyword)) continue;
    const checker = CHECKERS[keyword];
    if (checker === undefined) throw new Error(`json-schema-checker: ${keyword} is not known`);
    if (!checker(rule, value, path, context, schema)) {
      context.problems.push(
        `${path}: ${JSON.stringify(value)} against ${keyword} ${JSON.stringify(rule)}`,
      );
    }
  }
}

function isValid(schema, value, context) {
  const problems = [];
  check(schema, value, '', { root: context.root, problems });
  return problems.length === 0;
}

const isText = (value) => typeof value === 'string';
const isNumber = (value) => typeof value === 'number';
const isObject = (value) => typeof value === 'object' && value !== null && !Array.isArray(value);

function same(a, b) {
  if (Array.isArray(a) && Array.isArray(b))
    return a.length === b.length && a.every((each, i) => same(each, b[i]));
  if (!isObject(a) || !isObject(b)) return a === b;
  const keys = Object.keys(a);
  return (
    keys.length === Object.keys(b).length && keys.every((key) => key in b && same(a[key], b[key]))
  );
}

function isOfType(type, value) {
  switch (type) {
    case 'null':
      return value === null;
    case 'array':
      return Array.isArray(value);
    case 'object':
      return isObject(value);
    case 'integer':
      return Number.isInteger(value);
    case 'number':
      return isNumber(value) && Number.isFinite(value);
    default:
      return typeof value === type;
  }
}

const length = (text) => [...text].length;

const CHECKERS = {
  type: (types, value) => [types].flat().some((type) => isOfType(type, value)),
  enum: (values, value) => values.some((one) => same(one, value)),
  const: (one, value) => same(one, value),
  minimum: (bound, value) => !isNumber(value) || value >= bound,
  maximum: (bound, value) => !isNumber(value) || value <= bound,
  exclusiveMinimum: (bound, value) => !isNumber(value) || value > bound,
  exclusiveMaximum: (bound, value) => !isNumber(value) || value < bound,
  multipleOf: (step, value) => !isNumber(value) || isMultiple(value, step),
  minLength: (bound, value) => !isText(value) || length(value) >= bound,
  maxLength: (bound, value) => !isText(value) || length(value) <= bound,
  pattern: (source, value) => !isText(value) || new RegExp(source, 'u').test(value),
  format: (name, value) => !isText(value) || FORMATS[name](value),
  minItems: (bound, value) => !Array.isArray(value) || value.length >= bound,
  maxItems: (bound, value) => !Array.isArray(value) || value.length <= bound,
  minProperties: (bound, value) => !isObject(value) || Object.keys(value).length >= bound,
  maxProperties: (bound, value) => !isObject(value) || Object.keys(value).length <= bound,
  required: (keys, value) => !isObject(value) || keys.every((key) => Object.hasOwn(value, key)),
  properties: (schemas, value, path, context) => {
    if (!isObject(value)) return true;
    for (const [key, schema] of Object.entries(schemas)) {
      if (Object.hasOwn(value, key)) check(schema, value[key], `${path}/${key}`, context);
    }
    return true;
  },
  patternProperties: (schemas, value, path, context) => {
    if (!isObject(value)) return true;
    for (const [source, schema] of Object.entries(schemas)) {
      for (const [key, below] of Object.entries(value)) {
        if (new RegExp(source, 'u').test(key)) check(schema, below, `${path}/${key}`, context);
      }
    }
    return true;
  },
  additionalProperties: (schema, value, path, context, whole) => {
    if (!isObject(value)) return true;
    const patterns = Object.keys(whole.patternProperties ?? {}).map(
      (source) => new RegExp(source, 'u'),
    );
    for (const [key, below] of Object.entries(value)) {
      if (Object.hasOwn(whole.properties ?? {}, key)) continue;
      if (patterns.some((pattern) => pattern.test(key))) continue;
      check(schema, below, `${path}/${key}`, context);
    }
    return true;
  },
  propertyNames: (schema, value, path, context) => {
    if (isObject(value))
      for (const key of Object.keys(value)) check(schema, key, `${path}/${key}`, context);
    return true;
  },
  prefixItems: (schemas, value, path, context) => {
    if (!Array.isArray(value)) return true;
    schemas.slice(0, value.length).forEach((schema, index) => {
      check(schema, value[index], `${path}/${index}`, context);
    });
    return true;
  },
  items: (schema, value, path, context, whole) => {
    if (!Array.isArray(value)) return true;
    const from = whole.prefixItems?.length ?? 0;
    value.slice(from).forEach((item, index) => {
      check(schema, item, `${path}/${from + index}`, context);
    });
    return true;
  },
  allOf: (schemas, value, path, context) => {
    for (const schema of schemas) check(schema, value, path, context);
    return true;
  },
  anyOf: (schemas, value, _path, context) =>
    schemas.some((schema) => isValid(schema, value, context)),
  oneOf: (schemas, value, _path, context) =>
    schemas.filter((schema) => isValid(schema, value, context)).length === 1,
  $ref: (pointer, value, path, context) => {
    let schema = context.root;
    for (const part of pointer.split('/').slice(1)) schema = schema[part];
    check(schema, value, path, context);
    return true;
  },
};

// Decimal steps have no exact double: a multiple is what lies within rounding of one.
function isMultiple(value, step) {
  const ratio = value / step;
  return Math.abs(ratio - Math.round(ratio)) <= 1e-9 * Math.max(1, Math.abs(ratio));
}

function isDate(text) {
  const [, year, month, day] = /^(\d{4})-(\d\d)-(\d\d)$/.exec(text) ?? [];
  if (year === undefined || Number(month) < 1 || Number(month) > 12) return false;
  const last = new Date(Date.UTC(2000 + (Number(year) % 400), Number(month), 0)).getUTCDate();
  return Number(day) >= 1 && Number(day) <= last;
}

function isTime(text) {
  const [, hours, minutes, seconds] =
    /^(\d\d):(\d\d):(\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)$/.exec(text) ?? [];
  return hours !== undefined && Number(hours) < 24 && Number(minutes) < 60 && Number(seconds) < 60;
}

const FORMATS = {
  date: isDate,
  time: isTime,
  'date-time': (text) =>
    isDate(text.slice(0, 10)) && /^[Tt]$/.test(text[10] ?? '') && isTime(text.slice(11)),
  email: (text) => /^[^\s@."]+(\.[^\s@."]+)*@[^\s@.]+(\.[^\s@.]+)+$/.test(text),
  uuid: (text) => /^[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/i.test(text),
  ipv4: (text) =>
    text.split('.').length === 4 &&
    text
      .split('.')
      .every(
        (part) => /^\d{1,3}$/.test(part) && Number(part) < 256 && String(Number(part)) === part,
      ),
  ipv6: (text) =>
    text.split(':').length === 8 && text.split(':').every((part) => /^[\da-f]{1,4}$/i.test(part)),
  uri: (text) => URL.canParse(text) && !/\s/.test(text),
  hostname: (text) =>
    text.length < 254 &&
    text.split('.').every((label) => /^[a-z\d]([a-z\d-]{0,61}[a-z\d])?$/i.test(label)),
  duration: (text) =>
    /^P(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(\d+H)?(\d+M)?(\d+S)?)?)$/.test(text) && !/^P$|T$/.test(text),
};
