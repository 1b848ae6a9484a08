// Downloads a picture within limits: whole time, bytes, redirects, schemes. What a server says of
// the content is not trusted; the decoder judges the bytes. Runs on the JS thread.
import { TurbomindError } from './errors.js';

const MAX_REDIRECTS = 5;

/**
 * The bytes behind an http(s) URL.
 * @throws TurbomindError ERR_TM_IMAGE_FETCH; `signal.reason` when the caller aborts.
 */
export async function fetchBytes(
  url: string,
  limits: { readonly timeoutMs: number; readonly maxBytes: number },
  signal?: AbortSignal,
): Promise<Uint8Array> {
  const timeout = AbortSignal.timeout(limits.timeoutMs);
  const either = signal === undefined ? timeout : AbortSignal.any([signal, timeout]);
  try {
    const response = await follow(url, either);
    return await readBody(response, url, limits.maxBytes);
  } catch (error) {
    signal?.throwIfAborted();
    if (error instanceof TurbomindError) throw error;
    if (timeout.aborted)
      throw failed(url, `no answer within ${limits.timeoutMs} ms (imageFetch.timeoutMs)`, error);
    throw failed(url, describe(error), error);
  }
}

async function follow(url: string, signal: AbortSignal): Promise<Response> {
  let target = new URL(url);
  for (let hop = 0; hop <= MAX_REDIRECTS; hop++) {
    if (target.protocol !== 'http:' && target.protocol !== 'https:') {
      throw failed(url, `redirected to ${target.protocol}, which is not followed`);
    }
    const response = await fetch(target, { redirect: 'manual', signal });
    const location = response.headers.get('location');
    if (response.status < 300 || response.status >= 400 || location === null) return response;
    await response.body?.cancel();
    target = new URL(location, target);
  }
  throw failed(url, `more than ${MAX_REDIRECTS} redirects`);
}

async function readBody(response: Response, url: string, maxBytes: number): Promise<Uint8Array> {
  if (!response.ok || response.body === null) {
    await response.body?.cancel();
    throw failed(url, `status ${response.status} ${response.statusText}`.trim());
  }
  const chunks: Uint8Array[] = [];
  let total = 0;
  for await (const chunk of response.body) {
    total += chunk.length;
    if (total > maxBytes) throw failed(url, `more than imageFetch.maxBytes (${maxBytes})`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks, total);
}

function failed(url: string, reason: string, cause?: unknown): TurbomindError {
  const message = `image ${url}: could not be fetched: ${reason}`;
  return new TurbomindError('ERR_TM_IMAGE_FETCH', message, cause === undefined ? {} : { cause });
}

// fetch hides the real reason (ECONNREFUSED and so on) in its cause.
function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.cause instanceof Error ? error.cause.message || String(error.cause) : error.message;
}
