// Opens a Hugging Face model folder: config files, tensor table, chat template, generation
// defaults. Reads headers only, never weights; runs on the JS thread with asynchronous file reads.

import { stat } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { TurbomindError } from '../errors.js';
import type { ModelSpec, NativeDType, TensorEntry } from '../native-types.js';
import { ConfigReader, LIMITS } from './config.js';
import type { FamilyModel, VisionPart } from './families/family.js';
import { findModelFamily } from './families/index.js';
import {
  isJsonObject,
  type JsonObject,
  jsonGet,
  readJsonFile,
  readOptionalJsonFile,
  readOptionalTextFile,
} from './json.js';
import { readQuantization } from './quantization.js';
import { readTensorStore } from './safetensors.js';
import { type ResolvedWeights, resolveWeights } from './weights.js';

/** How pictures become tiles and tokens; absent for text models. */
export interface ImageSettings {
  /** Side of a tile in pixels. */
  readonly tileSize: number;
  readonly tokensPerTile: number;
  /** Fewest and most tiles of an image, thumbnail not counted. */
  readonly minDynamicPatch: number;
  readonly maxDynamicPatch: number;
  readonly useThumbnail: boolean;
  /** '<img>' */
  readonly startToken: string;
  /** '</img>' */
  readonly endToken: string;
  /** '<IMG_CONTEXT>': the prompt token that an image embedding replaces. */
  readonly contextToken: string;
}

/** generation_config.json: what the model's authors recommend. Absent fields were not given. */
export interface GenerationDefaults {
  readonly eosTokenIds: readonly number[];
  readonly doSample?: boolean;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly repetitionPenalty?: number;
  readonly maxNewTokens?: number;
}

/** Where the chat format comes from. */
export type ChatTemplateSource =
  | { readonly type: 'jinja'; readonly file: string; readonly template: string }
  | { readonly type: 'named'; readonly name: string };

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
    model.vision && (await readImageTokens(root, config, model.vision, tokenizerConfig ?? {}));
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
    generation: readGeneration(generationJson, model),
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

/** A template file wins over tokenizer_config.json, and any template over a format's name. */
async function readChatTemplate(
  root: string,
  tokenizerConfig: JsonObject,
  name: string | undefined,
): Promise<ChatTemplateSource | undefined> {
  const file = join(root, 'chat_template.jinja');
  const jinja = await readOptionalTextFile(file, 'ERR_TM_INVALID_TEMPLATE');
  if (jinja !== undefined) return { type: 'jinja', file, template: jinja };
  const wrapped = await readOptional(root, 'chat_template.json');
  const sources: readonly (readonly [string, JsonObject])[] = [
    ['chat_template.json', wrapped ?? {}],
    ['tokenizer_config.json', tokenizerConfig],
  ];
  for (const [source, json] of sources) {
    const template = pickTemplate(jsonGet(json, 'chat_template'), source);
    if (template !== undefined) return { type: 'jinja', file: join(root, source), template };
  }
  return name === undefined ? undefined : { type: 'named', name };
}

/** A template, or the one called 'default' (else the first) of a list of named ones. */
function pickTemplate(value: unknown, source: string): string | undefined {
  if (value === undefined || value === null) return undefined;
  if (typeof value === 'string') return value;
  if (Array.isArray(value)) {
    const named = value.filter(isJsonObject);
    const chosen = named.find((entry) => entry.name === 'default') ?? named[0];
    if (typeof chosen?.template === 'string') return chosen.template;
  }
  throw new TurbomindError(
    'ERR_TM_INVALID_TEMPLATE',
    `${source}: chat_template is neither a string nor a list of { name, template }`,
  );
}

/** Resolves the image tokens by their strings; config.json's id must agree. */
async function readImageTokens(
  root: string,
  config: ConfigReader,
  vision: VisionPart,
  tokenizerConfig: JsonObject,
): Promise<{ image: ImageSettings; imageTokenId: number }> {
  const reader = new ConfigReader(tokenizerConfig, 'tokenizer_config.json');
  const contextToken = reader.string('context_image_token', '<IMG_CONTEXT>');
  const found = await findTokenId(root, tokenizerConfig, contextToken);
  const imageTokenId = found ?? vision.imageTokenId;
  if (imageTokenId === undefined) {
    throw new TurbomindError(
      'ERR_TM_INVALID_TOKENIZER',
      `no tokenizer file defines the image token ${contextToken} (${root})`,
    );
  }
  if (vision.imageTokenId !== undefined && vision.imageTokenId !== imageTokenId) {
    throw config.invalid(
      'image_token_id',
      vision.imageTokenId,
      `${imageTokenId} (${contextToken})`,
    );
  }
  const { imageSize, patchSize, shuffleFactor } = vision.spec;
  if (vision.tiling.minDynamicPatch > vision.tiling.maxDynamicPatch) {
    throw config.invalid('min_dynamic_patch', vision.tiling.minDynamicPatch, 'at most the maximum');
  }
  return {
    imageTokenId,
    image: {
      tileSize: imageSize,
      tokensPerTile: (imageSize / patchSize / shuffleFactor) ** 2,
      ...vision.tiling,
      startToken: reader.string('start_image_token', '<img>'),
      endToken: reader.string('end_image_token', '</img>'),
      contextToken,
    },
  };
}

/** Looks in the small files first: parsing a large tokenizer.json takes a quarter of a second. */
async function findTokenId(
  root: string,
  tokenizerConfig: JsonObject,
  token: string,
): Promise<number | undefined> {
  const decoder = jsonGet(tokenizerConfig, 'added_tokens_decoder');
  for (const [id, entry] of Object.entries(isJsonObject(decoder) ? decoder : {})) {
    if (isJsonObject(entry) && entry.content === token) return Number(id);
  }
  const added = await readOptional(root, 'added_tokens.json');
  const listed = added === undefined ? undefined : jsonGet(added, token);
  if (typeof listed === 'number') return listed;
  const tokenizer = await readOptional(root, 'tokenizer.json');
  const tokens = tokenizer === undefined ? [] : jsonGet(tokenizer, 'added_tokens');
  const entry = Array.isArray(tokens)
    ? tokens.find((candidate) => isJsonObject(candidate) && candidate.content === token)
    : undefined;
  return isJsonObject(entry) && typeof entry.id === 'number' ? entry.id : undefined;
}

function readGeneration(json: JsonObject | undefined, model: FamilyModel): GenerationDefaults {
  const reader = new ConfigReader(json ?? {}, 'generation_config.json');
  const own = readTokenIds(reader, 'eos_token_id');
  // The innermost config is the language model's.
  const configs = [...model.configs].reverse();
  const inherited = configs.map((config) => readTokenIds(config, 'eos_token_id'));
  const optional = {
    doSample: reader.optionalBoolean('do_sample'),
    temperature: reader.optionalNumber('temperature', { min: 0, max: 100 }),
    topK: reader.optionalInteger('top_k', { min: 0, max: LIMITS.vocab.max }),
    topP: reader.optionalNumber('top_p', { min: 0, max: 1 }),
    minP: reader.optionalNumber('min_p', { min: 0, max: 1 }),
    repetitionPenalty: reader.optionalNumber('repetition_penalty', { min: 0.01, max: 100 }),
    maxNewTokens: reader.optionalInteger('max_new_tokens', LIMITS.positions),
  };
  return {
    eosTokenIds: [own, ...inherited].find((ids) => ids.length > 0) ?? [],
    ...dropUndefined(optional),
  };
}

/** A token id or a list of them; [] when absent. */
function readTokenIds(config: ConfigReader, key: string): number[] {
  const value = config.raw(key) ?? [];
  const ids: unknown[] = Array.isArray(value) ? value : [value];
  const isId = (id: unknown): id is number =>
    typeof id === 'number' && Number.isInteger(id) && id >= 0 && id < LIMITS.vocab.max;
  if (!ids.every(isId)) throw config.invalid(key, value, 'a token id or a list of token ids');
  return [...new Set(ids)];
}

type Defined<T> = { [K in keyof T]?: Exclude<T[K], undefined> };

function dropUndefined<T extends Record<string, unknown>>(fields: T): Defined<T>;
function dropUndefined(fields: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}

function sumUp(weights: ResolvedWeights): CheckpointTotals {
  const { parameters, bytesByDType, unusedTensors } = weights;
  const bytes = Object.values(bytesByDType).reduce((sum, part) => sum + part, 0);
  return { parameters, bytes, bytesByDType, unusedTensors };
}
