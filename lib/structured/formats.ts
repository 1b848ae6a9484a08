// The `format`s of JSON schema strings that can be promised, as regular expressions. Each allows a
// subset of its standard: every text it gives is valid, some rare valid forms are left out
// (29 February, leap seconds, IPv6 with `::`, quoted mailboxes). Pure data.
import type { Pattern } from './pattern.js';
import { parseRegex } from './regex.js';

const DATE =
  '\\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|02-(?:0[1-9]|1\\d|2[0-8]))';
const TIME =
  '(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d{1,6})?(?:Z|[+\\-](?:[01]\\d|2[0-3]):[0-5]\\d)';
const OCTET = '(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)';
// Never two hyphens together (they announce Punycode), never a number last (it announces IPv4).
const LABEL = '[A-Za-z0-9]{1,15}(?:-[A-Za-z0-9]{1,15}){0,2}';
const TOP = '[A-Za-z]{2,10}';
const HOST = `(?:${LABEL}\\.){0,3}${TOP}`;
// Four of them and their dots fit into the 64 octets that a mailbox's name may have.
const ATOM = '[A-Za-z0-9_+\\-]{1,15}';
const HEX = '[0-9a-fA-F]';
const PATH_CHAR = "[A-Za-z0-9._~\\-!$&'()*+,;=:@/]";

const SOURCES: ReadonlyMap<string, string> = new Map([
  ['date', DATE],
  ['time', TIME],
  ['date-time', `${DATE}T${TIME}`],
  ['duration', 'P(?:\\d{1,4}W|\\d{1,4}D|(?:\\d{1,4}D)?T\\d{1,4}[HMS])'],
  ['email', `${ATOM}(?:\\.${ATOM}){0,3}@(?:${LABEL}\\.){1,3}${TOP}`],
  ['hostname', HOST],
  ['ipv4', `${OCTET}(?:\\.${OCTET}){3}`],
  ['ipv6', `${HEX}{1,4}(?::${HEX}{1,4}){7}`],
  ['uuid', `${HEX}{8}-${HEX}{4}-${HEX}{4}-${HEX}{4}-${HEX}{12}`],
  ['uri', `https?://${HOST}(?::[1-9]\\d{0,3})?(?:/${PATH_CHAR}*)?(?:\\?${PATH_CHAR}*)?`],
]);

export const FORMATS: readonly string[] = [...SOURCES.keys()];

/** The texts of a format; undefined for one that is not known. */
export function formatPattern(name: string): Pattern | undefined {
  const source = SOURCES.get(name);
  return source === undefined ? undefined : parseRegex(source);
}
