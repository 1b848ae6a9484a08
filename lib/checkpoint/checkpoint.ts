// Opens a Hugging Face model folder: config files, tensor table, chat template, generation
// defaults. Reads headers only, never weights; runs on the JS thread with asynchronous file reads.

import { stat } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { TurbomindError } from '../errors.js';
import type { ModelSpec, NativeDType, TensorEntry } from '../native-types.js';
import { ConfigReader } from './config.js';
import { findModelFamily } from './families/index.js';
import { type GenerationDefaults, readGeneration } from './generation.js';
import { type ImageSettings, readImageSettings } from './image-settings.js';
import { type JsonObject, readJsonFile, readOptionalJsonFile } from './json.js';
import { readQuantization } from './quantization.js';
import { readTensorStore } from './safetensors.js';
import { type ChatTemplateSource, readChatTemplate } from './template.js';
import { type ResolvedWeights, resolveWeights } from './weights.js';

export type { GenerationDefaults } from './generation.js';
export type { ImageSettings } from './image-settings.js';
export type { ChatTemplateSource } from './template.js';

/** Sums for `inspect`. */
export interface CheckpointTotals {
  /** Weights as the model counts them: a packed 4-bit word is eight. */
  readonly parameters: number;
  /** Bytes of the tensors the model uses. */
  readonly bytes: number;
  readonly bytesByDType: Readonly<Partial<Record<NativeDType, number>>>;
  /** Tensors in the files that the model does not use. */
  readonly unusedTensors: number;
}

/** A model folder, understood. */
export interface Checkpoint {
  /** Absolute path. */
  readonly folder: string;
  /** `architectures[0]` of config.json. */
  readonly architecture: string;
  readonly spec: ModelSpec;
  /** Absolute paths of the safetensors files that hold used tensors. */
  readonly files: readonly string[];
  readonly tensors: readonly TensorEntry[];
  readonly image?: ImageSettings;
  readonly generation: GenerationDefaults;
  readonly chatTemplate?: ChatTemplateSource;
  /** Tokens; no sequence may be longer, so `sessionLen` is capped by it. */
  readonly maxPositionEmbeddings: number;
  readonly totals: CheckpointTotals;
  /** tokenizer_config.json, {} when absent. tokenizer.json is read by `loadTokenizer`. */
  readonly tokenizerConfig: Readonly<Record<string, unknown>>;
}

/**
 * Opens a model folder and checks everything that can be checked without reading weights.
 *
 * @example
 * const checkpoint = await openCheckpoint('/models/InternVL3-1B-hf');
 * console.log(checkpoint.architecture, checkpoint.totals.parameters);
 *
 * @throws TurbomindError ERR_TM_MODEL_NOT_FOUND, ERR_TM_INVALID_CONFIG, ERR_TM_INVALID_CHECKPOINT,
 * ERR_TM_MISSING_TENSOR, ERR_TM_TENSOR_MISMATCH, ERR_TM_UNSUPPORTED_MODEL or
 * ERR_TM_UNSUPPORTED_QUANTIZATION, each naming the file, the field and the remedy.
 */
export async function openCheckpoint(folder: string): Promise<Checkpoint> {
  const root = resolve(folder);
  await requireFolder(root);
  const json = await readJsonFile(join(root, 'config.json'), 'ERR_TM_INVALID_CONFIG');
  const config = new ConfigReader(json, 'config.json');
  const { family, architecture } = findModelFamily(config);
  const [preprocessor, tokenizerConfig, generationJson, store] = await Promise.all([
    readPreprocessor(root),
    readOptional(root, 'tokenizer_config.json'),
    readOptional(root, 'generation_config.json'),
    readTensorStore(root),
  ]);
  const model = family.read({
    config,
    hasTensor: (name) => store.has(name),
    ...(preprocessor === undefined ? {} : { preprocessor }),
  });
  const quant = readQuantization(model.configs);
  const weights = resolveWeights(model.weights, store, quant);
  const chatTemplate = await readChatTemplate(root, tokenizerConfig ?? {}, model.templateName);
  const vision =
    model.vision && (await readImageSettings(root, config, model.vision, tokenizerConfig ?? {}));
  if (vision !== undefined && vision.imageTokenId >= model.decoder.vocabSize) {
    throw config.invalid('vocab_size', model.decoder.vocabSize, "more than the image token's id");
  }
  return {
    folder: root,
    architecture,
    spec: {
      decoder: model.decoder,
      ...(model.vision === undefined ? {} : { vision: model.vision.spec }),
      quant,
      imageTokenId: vision?.imageTokenId ?? -1,
    },
    files: weights.files,
    tensors: weights.tensors,
    ...(vision === undefined ? {} : { image: vision.image }),
    generation: readGeneration(generationJson, model.configs),
    ...(chatTemplate === undefined ? {} : { chatTemplate }),
    maxPositionEmbeddings: model.decoder.maxPositionEmbeddings,
    totals: sumUp(weights),
    tokenizerConfig: tokenizerConfig ?? {},
  };
}

async function requireFolder(root: string): Promise<void> {
  const found = await stat(root).catch((cause: unknown) => {
    throw notFound(`there is no model folder at ${root}`, cause);
  });
  if (!found.isDirectory()) {
    throw notFound(`${root} is a file; pass the folder that holds config.json and the weights`);
  }
}

function notFound(message: string, cause?: unknown): TurbomindError {
  return new TurbomindError('ERR_TM_MODEL_NOT_FOUND', message, { cause });
}

function readOptional(root: string, name: string): Promise<JsonObject | undefined> {
  return readOptionalJsonFile(join(root, name), 'ERR_TM_INVALID_CONFIG');
}

/** transformers 5 keeps the image processor's fields inside processor_config.json. */
async function readPreprocessor(root: string): Promise<ConfigReader | undefined> {
  const own = await readOptional(root, 'preprocessor_config.json');
  if (own !== undefined) return new ConfigReader(own, 'preprocessor_config.json');
  const processor = await readOptional(root, 'processor_config.json');
  if (processor === undefined) return undefined;
  return new ConfigReader(processor, 'processor_config.json').optionalObject('image_processor');
}

function sumUp(weights: ResolvedWeights): CheckpointTotals {
  const { parameters, bytesByDType, unusedTensors } = weights;
  const bytes = Object.values(bytesByDType).reduce((sum, part) => sum + part, 0);
  return { parameters, bytes, bytesByDType, unusedTensors };
}
