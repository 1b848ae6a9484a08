// `turbomind-node inspect`: what a model folder holds and what running it will take. Reads headers
// only. Runs on the main thread.
import { type Checkpoint, openCheckpoint } from '../checkpoint/checkpoint.js';
import { embeddedModel } from '../embedded-model.js';
import { resolvePipelineOptions } from '../options.js';
import { formatBytes, formatCount, printJson, printRows } from './output.js';

export interface InspectFlags {
  readonly sessionLen?: number;
  readonly json?: boolean;
}

/** Bytes that a model will need. Activations and the tokenizer come on top. */
interface MemoryEstimate {
  /** Weights as they are stored; their packed form in memory is of about this size. */
  readonly weightBytes: number;
  /** Keys and values of one token in all layers, float32. */
  readonly kvBytesPerToken: number;
  readonly sessionLen: number;
  /** One session of sessionLen tokens. */
  readonly kvBytesPerSession: number;
  readonly totalBytes: number;
}

const BLOCK_SIZE = 64;
const KV_ELEMENT_BYTES = 4;

export async function inspect(model: string | undefined, flags: InspectFlags): Promise<void> {
  const checkpoint = await openCheckpoint(model ?? embeddedModel());
  const { sessionLen } = resolvePipelineOptions({ sessionLen: flags.sessionLen });
  const memory = estimateMemory(checkpoint, sessionLen || checkpoint.maxPositionEmbeddings);
  if (flags.json) printJson(toJson(checkpoint, memory));
  else printRows([...describeModel(checkpoint), ...describeMemory(memory)]);
}

function estimateMemory(checkpoint: Checkpoint, sessionLen: number): MemoryEstimate {
  const { numLayers, numKvHeads, headDim } = checkpoint.spec.decoder;
  const kvBytesPerToken = numLayers * numKvHeads * headDim * 2 * KV_ELEMENT_BYTES;
  const kvBytesPerSession = Math.ceil(sessionLen / BLOCK_SIZE) * BLOCK_SIZE * kvBytesPerToken;
  const weightBytes = checkpoint.totals.bytes;
  return {
    weightBytes,
    kvBytesPerToken,
    sessionLen,
    kvBytesPerSession,
    totalBytes: weightBytes + kvBytesPerSession,
  };
}

function describeModel(checkpoint: Checkpoint): [string, string][] {
  const { decoder, vision, quant } = checkpoint.spec;
  const dtypes = Object.entries(checkpoint.totals.bytesByDType)
    .map(([dtype, bytes]) => `${dtype} ${formatBytes(bytes ?? 0)}`)
    .join(', ');
  const template = checkpoint.chatTemplate;
  return [
    ['folder', checkpoint.folder],
    ['architecture', checkpoint.architecture],
    ['parameters', formatCount(checkpoint.totals.parameters)],
    [
      'weights',
      `${formatBytes(checkpoint.totals.bytes)} in ${checkpoint.files.length} file(s): ${dtypes}`,
    ],
    [
      'quantization',
      quant.method === 'none' ? 'none' : `${quant.method}, groups of ${quant.groupSize}`,
    ],
    [
      'decoder',
      `${decoder.numLayers} layers, hidden ${decoder.hiddenSize}, ${decoder.numHeads} heads ` +
        `(${decoder.numKvHeads} KV) of ${decoder.headDim}, MLP ${decoder.intermediateSize}, ` +
        `vocabulary ${decoder.vocabSize}`,
    ],
    [
      'vision',
      vision === undefined ? 'none' : `${vision.numLayers} layers, hidden ${vision.hiddenSize}`,
    ],
    ['pictures', describePictures(checkpoint)],
    [
      'chat template',
      template === undefined ? 'none' : template.type === 'jinja' ? template.file : template.name,
    ],
    ['positions', String(checkpoint.maxPositionEmbeddings)],
  ];
}

function describePictures({ image }: Checkpoint): string {
  if (image === undefined) return 'none';
  const { minDynamicPatch, maxDynamicPatch, tileSize, tokensPerTile, useThumbnail } = image;
  const thumbnail = useThumbnail ? ' and a thumbnail' : '';
  return (
    `${minDynamicPatch} to ${maxDynamicPatch} tiles of ${tileSize} x ${tileSize} pixels${thumbnail}, ` +
    `${tokensPerTile} tokens each`
  );
}

function describeMemory(memory: MemoryEstimate): [string, string][] {
  return [
    ['KV cache', `${formatBytes(memory.kvBytesPerToken)} a token`],
    ['one session', `${formatBytes(memory.kvBytesPerSession)} for ${memory.sessionLen} tokens`],
    ['memory needed', `about ${formatBytes(memory.totalBytes)}: weights and one full session`],
  ];
}

function toJson(checkpoint: Checkpoint, memory: MemoryEstimate): object {
  const { folder, architecture, files, spec, image, totals, chatTemplate } = checkpoint;
  return {
    folder,
    architecture,
    files,
    parameters: totals.parameters,
    bytesByDType: totals.bytesByDType,
    unusedTensors: totals.unusedTensors,
    spec,
    image: image ?? null,
    chatTemplate: chatTemplate?.type ?? null,
    memory,
  };
}
