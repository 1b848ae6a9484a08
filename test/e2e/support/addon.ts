// Loads the freshly built addon by path, without the loader of lib/.
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import type { NativeAddon, NativeTileOptions } from '../../../lib/native-types.js';

export const ADDON_PATH: string = fileURLToPath(
  new URL('../../../build/Release/turbomind.node', import.meta.url),
);

/** The addon border: what the file exports is what native-types.ts says. */
export const addon = createRequire(import.meta.url)(ADDON_PATH) as NativeAddon;

export function tileOptions(options: Partial<NativeTileOptions> = {}): NativeTileOptions {
  return { tileSize: 448, minTiles: 1, maxTiles: 12, useThumbnail: true, ...options };
}

/** What `run` throws or rejects with, as code and message; fails the test when it does neither. */
export async function failureOf(run: () => unknown): Promise<{ code: unknown; message: string }> {
  try {
    await run();
  } catch (error) {
    if (!(error instanceof Error)) throw error;
    return { code: 'code' in error ? error.code : undefined, message: error.message };
  }
  throw new Error('expected a failure');
}
