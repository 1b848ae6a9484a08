// The bytes of a `data:` URL, decoded in slices on the JS thread: tens of MB of base64 must not hold up
// token streams. What may be in it and how large it may be: lib/image.ts.
import { TurbomindError } from './errors.js';
import { PICTURE_SLICE_MS, Turns } from './turns.js';

/** Characters; well under a millisecond even where line breaks or escapes are taken out. */
const PIECE_CHARS = 1 << 17;

/** A `data:` URL taken apart; its body is not decoded yet. */
export interface DataUrl {
  readonly url: string;
  /** Where its body begins. */
  readonly begin: number;
  readonly isBase64: boolean;
  /** Bytes it holds if nothing is escaped or broken into lines, without them if everything is. */
  readonly bytes: number;
}

/** @throws TurbomindError ERR_TM_INVALID_IMAGE when its header has no end. */
export function parseDataUrl(url: string): DataUrl {
  const comma = url.indexOf(',');
  if (comma < 0) throw malformed('no comma ends its header');
  const isBase64 = /;\s*base64\s*$/i.test(url.slice(0, comma));
  // Base64 holds three bytes in four letters.
  const bytes = (url.length - comma) * (isBase64 ? 0.75 : 1 / 3);
  return { url, begin: comma + 1, isBase64, bytes };
}

/** @throws TurbomindError ERR_TM_INVALID_IMAGE when the body is malformed. */
export async function decodeDataUrl(
  { url, begin, isBase64 }: DataUrl,
  turns: Turns = new Turns(PICTURE_SLICE_MS),
  pieceChars: number = PIECE_CHARS,
): Promise<Uint8Array> {
  const chars = url.length - begin;
  const sink = isBase64 ? new Base64Sink(chars) : new LatinSink(chars);
  for (let at = begin; at < url.length; ) {
    await turns.giveWay();
    const end = endOfPiece(url, at + pieceChars);
    const piece = url.slice(at, end);
    sink.push(piece.includes('%') ? unescapePercent(piece) : piece);
    at = end;
  }
  return sink.end();
}

// No escape is cut in two.
function endOfPiece(url: string, wanted: number): number {
  if (url[wanted - 1] === '%') return wanted + 2;
  if (url[wanted - 2] === '%') return wanted + 1;
  return wanted;
}

function unescapePercent(text: string): string {
  if (/%(?![0-9a-f]{2})/i.test(text)) throw malformed('a % lacks its two hex digits');
  return text.replace(/%([0-9a-f]{2})/gi, (_, hex: string) =>
    String.fromCharCode(Number.parseInt(hex, 16)),
  );
}

class LatinSink {
  readonly #out: Buffer;
  #length = 0;

  constructor(chars: number) {
    this.#out = Buffer.allocUnsafeSlow(chars);
  }

  push(text: string): void {
    this.#length += this.#out.write(text, this.#length, 'latin1');
  }

  end(): Uint8Array {
    return this.#out.subarray(0, this.#length);
  }
}

/** What `Buffer.from(text, 'base64')` gives for all the text, but other characters are refused. */
class Base64Sink {
  readonly #out: Buffer;
  #length = 0;
  /** Fewer than four letters, and white space, that wait for the next piece. */
  #rest = '';
  /** Behind the first '=' nothing counts. */
  #ended = false;

  constructor(chars: number) {
    this.#out = Buffer.allocUnsafeSlow(Math.ceil(chars / 4) * 3);
  }

  push(piece: string): void {
    if (this.#ended) {
      checkCharacters(piece);
      return;
    }
    const text = this.#rest + piece;
    this.#rest = '';
    if (this.#decode(text, text.length)) return;
    const padding = text.indexOf('=');
    this.#ended = padding >= 0;
    if (this.#ended) checkCharacters(text.slice(padding));
    const letters = this.#ended ? text.slice(0, padding) : text;
    const numLetters = letters.length - countSpaces(letters);
    const end = beforeLast(letters, numLetters % 4);
    this.#rest = letters.slice(end);
    if (!this.#decode(letters.slice(0, end), numLetters - (numLetters % 4))) throw badLetters();
  }

  // Whether so many letters are in it: Buffer passes over all that are none, and writes fewer bytes.
  #decode(text: string, numLetters: number): boolean {
    const written = this.#out.write(text, this.#length, 'base64');
    if (written !== (numLetters * 3) / 4) return false;
    this.#length += written;
    return true;
  }

  end(): Uint8Array {
    checkCharacters(this.#rest);
    this.#length += this.#out.write(this.#rest, this.#length, 'base64');
    return this.#out.subarray(0, this.#length);
  }
}

const isSpace = (code: number): boolean => code <= 32 && (code === 32 || (code >= 9 && code <= 13));

function countSpaces(text: string): number {
  const codes = Buffer.from(text, 'utf8');
  let count = 0;
  for (let i = 0; i < codes.length; i += 1) if (isSpace(codes[i] ?? 0)) count += 1;
  return count;
}

/** Where the last `numLetters` that are not white space begin. */
function beforeLast(text: string, numLetters: number): number {
  let end = text.length;
  for (let left = numLetters; left > 0; ) {
    end -= 1;
    if (!isSpace(text.charCodeAt(end))) left -= 1;
  }
  return end;
}

function checkCharacters(text: string): void {
  if (/[^A-Za-z0-9+/=_\t-\r -]/.test(text)) throw badLetters();
}

function badLetters(): TurbomindError {
  return malformed('its base64 is malformed');
}

function malformed(problem: string): TurbomindError {
  return new TurbomindError('ERR_TM_INVALID_IMAGE', `data URL image: ${problem}`);
}
