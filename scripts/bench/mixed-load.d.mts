import type { Pipeline } from '../../lib/pipeline.js';

export interface MixedLoadReport {
  readonly counts: Readonly<
    Record<'started' | 'finished' | 'aborted' | 'broken' | 'failed' | 'tokens', number>
  >;
  readonly byKind: Readonly<Record<string, number>>;
  readonly problems: readonly { readonly kind: string; readonly problem: string }[];
  readonly idle: Readonly<Record<'running' | 'waiting' | 'freeBlocks' | 'totalBlocks', number>>;
}

export function runMixedLoad(
  pipe: Pipeline,
  options: {
    readonly seconds: number;
    readonly streams: number;
    readonly pictureEvery: number;
    readonly seed: number;
  },
): Promise<MixedLoadReport>;

export function isSound(
  report: MixedLoadReport,
): Readonly<Record<'noFailures' | 'everyRequestEnds' | 'idleAfterwards', boolean>>;
