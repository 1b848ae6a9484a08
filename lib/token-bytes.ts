// How vocabularies spell bytes: GPT-2's alphabet of 256 characters, or sentencepiece's `▁` and
// `<0xNN>`. Pure functions; the tables are built once, when first imported.

/** How a vocabulary spells bytes. */
export type ByteSpelling = 'byte-level' | 'sentencepiece';

/** UTF-8 bytes that a vocabulary's token stands for, maybe part of a character. */
export function bytesOfToken(token: string, spelling: ByteSpelling): Uint8Array {
  return spelling === 'byte-level' ? byteLevelBytes(token) : sentencepieceBytes(token);
}

export function bytesOfText(text: string): Uint8Array {
  return UTF8.encode(text);
}

/** The text of whole characters; undefined when some bytes are not. */
export function textOfBytes(bytes: Uint8Array): string | undefined {
  try {
    return STRICT_UTF8.decode(bytes);
  } catch {
    return undefined; // part of a character: normal for byte-level tokens
  }
}

const UTF8 = new TextEncoder();
const STRICT_UTF8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/**
 * GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the other 68 bytes in
 * order for the characters from U+0100 on.
 */
const BYTE_OF_CHAR: ReadonlyMap<string, number> = (() => {
  const isPrintable = (byte: number): boolean =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  const table = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte += 1) {
    table.set(String.fromCharCode(isPrintable(byte) ? byte : next), byte);
    if (!isPrintable(byte)) next += 1;
  }
  return table;
})();

function byteLevelBytes(token: string): Uint8Array {
  const bytes: number[] = [];
  for (const char of token) {
    const byte = BYTE_OF_CHAR.get(char);
    // A token with a character outside the alphabet is text, not spelled bytes.
    if (byte === undefined) return UTF8.encode(token);
    bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

function sentencepieceBytes(token: string): Uint8Array {
  const spelled = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1];
  if (spelled !== undefined) return Uint8Array.of(Number.parseInt(spelled, 16));
  return UTF8.encode(token.replaceAll('▁', ' '));
}
