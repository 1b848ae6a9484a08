// Waiting that an AbortSignal ends, for work that goes on all the same. Runs on the JS thread.

/** What `promise` gives. @throws `signal.reason` as soon as the signal aborts. */
export async function abortable<T>(
  promise: Promise<T>,
  signal: AbortSignal | undefined,
): Promise<T> {
  if (signal === undefined) return await promise;
  let unlisten = (): void => undefined;
  const aborted = new Promise<never>((_, reject) => {
    const onAbort = (): void => reject(signal.reason);
    if (signal.aborted) return onAbort();
    signal.addEventListener('abort', onAbort, { once: true });
    unlisten = () => signal.removeEventListener('abort', onAbort);
  });
  try {
    return await Promise.race([aborted, promise]);
  } finally {
    unlisten();
  }
}
