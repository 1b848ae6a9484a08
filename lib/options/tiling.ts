// How pictures are cut: the options that a pipeline and a request share, their rules, and the form
// in which the rest of the library passes them on. Pure functions.
import * as check from '../check.js';

/** How pictures are cut; undefined: the model's own. */
export interface TilingOptions {
  readonly minTiles: number | undefined;
  readonly maxTiles: number | undefined;
  readonly useThumbnail: boolean | undefined;
}

interface PatchOptions {
  readonly minDynamicPatch?: number | undefined;
  readonly maxDynamicPatch?: number | undefined;
  readonly useThumbnail?: boolean | undefined;
}

const MAX_TILES = 1024;

export const TILING_RULES: check.Rules<PatchOptions> = {
  minDynamicPatch: check.integer(1, MAX_TILES),
  maxDynamicPatch: check.integer(1, MAX_TILES),
  useThumbnail: check.boolean,
};

/** @throws TurbomindError ERR_TM_INVALID_OPTION when the least is above the most. */
export function resolveTiling(options: PatchOptions): TilingOptions {
  const { minDynamicPatch, maxDynamicPatch } = options;
  if (minDynamicPatch !== undefined && maxDynamicPatch !== undefined) {
    if (minDynamicPatch > maxDynamicPatch) {
      const expected = `at most maxDynamicPatch (${maxDynamicPatch})`;
      throw check.invalidOption('minDynamicPatch', minDynamicPatch, expected);
    }
  }
  return {
    minTiles: minDynamicPatch,
    maxTiles: maxDynamicPatch,
    useThumbnail: options.useThumbnail,
  };
}
