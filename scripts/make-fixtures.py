#!/usr/bin/env python3
"""Writes test/fixtures/models: small random checkpoints in Hugging Face form with reference outputs.

    python3 scripts/make-fixtures.py            writes them
    python3 scripts/make-fixtures.py --check    fails if the folder differs from what it would write

Needs numpy alone and shares no code with the product: names, layouts, the packing of 4-bit weights
and the networks are written down here a second time, in float64, from the published formats. Each
folder holds what a model folder holds (no tokenizer: test/fixtures/models/tokenizer serves all) and

  native.json    the spec and tensor table that lib/checkpoint must hand to native code
  expected.json  cases: input ids, logits of the token after them, greedy ids, for models with a
                 vision tower the number of tiles and their embeddings

Tiles are not stored: pixel (y, x, channel) of tile t is
(71 t + (3 + channel) y + (5 + t) x + 40 channel) mod 256.
"""
import json
import math
import os
import shutil
import struct
import sys
import tempfile

import numpy as np

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "test", "fixtures", "models")
VOCAB, IMAGE, EOS = 272, 261, 258          # ids of the byte-level tokenizer
SPECIAL_TOKENS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": EOS, "<img>": 259, "</img>": 260,
                  "<IMG_CONTEXT>": IMAGE, "<video>": 262}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NEW_TOKENS = 8
MIN_MARGIN = 0.05                          # between the best and the second logit of every step
erf = np.vectorize(math.erf)


# ---- numbers as files store them ---------------------------------------------------------------

def encode(values, dtype):
    """float64 array -> (bytes, the float64 values that the bytes stand for)."""
    if dtype == "F32":
        stored = values.astype("<f4")
        return stored.tobytes(), stored.astype(np.float64)
    if dtype == "F16":
        stored = values.astype("<f2")
        return stored.tobytes(), stored.astype(np.float64)
    bits = values.astype("<f4").view("<u4").astype(np.uint64)      # BF16: round to nearest even
    half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return half.tobytes(), (half.astype("<u4") << 16).view("<f4").astype(np.float64)


class Checkpoint:
    """Tensors in the order they are added; what a tensor is worth in float64 is kept beside it."""

    def __init__(self, seed, dtype):
        self.random = np.random.RandomState(seed)      # its stream never changes between versions
        self.dtype = dtype
        self.files = {}                                # name -> (dtype, shape, bytes)
        self.values = {}                               # canonical name -> float64 array
        self.canonical = {}                            # canonical name -> (file name, first row, shape)

    def put(self, file_name, shape, std, mean=0.0, dtype=None, names=None):
        """A random tensor. names: canonical names that share its rows equally, if not one alone."""
        dtype = dtype or self.dtype
        raw, values = encode(self.random.standard_normal(shape) * std + mean, dtype)
        self.files[file_name] = (dtype, list(shape), raw)
        self.name(file_name, values, names)

    def name(self, file_name, values, names):
        rows = values.shape[0] // len(names)
        for i, name in enumerate(names):
            part = values[i * rows:(i + 1) * rows]
            self.values[name] = part
            self.canonical[name] = (file_name, i * rows, list(part.shape))

    def awq(self, file_prefix, n, k, group, std, name, scale_dtype="F16"):
        """AutoAWQ "gemm": every eight columns share an int32, in the order 0 2 4 6 1 3 5 7."""
        q = self.random.randint(0, 16, (k, n))
        z = self.random.randint(4, 12, (k // group, n))
        spread = 1 + 0.3 * self.random.standard_normal((k // group, n))
        raw, scale = encode(np.abs(spread) * std / 5.1, scale_dtype)
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def pack(a):
            words = np.zeros((a.shape[0], n // 8), np.uint32)
            for place, column in enumerate(order):
                words |= a[:, column::8].astype(np.uint32) << np.uint32(4 * place)
            return words.astype("<u4").tobytes()

        parts = {"qweight": ("I32", [k, n // 8], pack(q)), "qzeros": ("I32", [k // group, n // 8], pack(z)),
                 "scales": (scale_dtype, [k // group, n], raw)}
        for part, entry in parts.items():
            self.files[f"{file_prefix}.{part}"] = entry
            self.canonical[f"{name}.{part}"] = (f"{file_prefix}.{part}", 0, entry[1])
        self.values[name + ".weight"] = ((q - np.repeat(z, group, 0)) * np.repeat(scale, group, 0)).T

    def linear(self, file_prefix, n, k, name, gain=1.0, bias=None, group=0, bias_dtype=None):
        std = gain / math.sqrt(k)
        if group:
            self.awq(file_prefix, n, k, group, std, name)
        else:
            self.put(file_prefix + ".weight", (n, k), std, names=[name + ".weight"])
        if bias is not None:
            self.put(file_prefix + ".bias", (n,), bias, dtype=bias_dtype, names=[name + ".bias"])

    def write(self, folder, shards, header_pad):
        """Sharded or single; header_pad spaces end each header and so shift all data."""
        names = list(self.files)
        cuts = [round(i * len(names) / shards) for i in range(shards + 1)]
        files = ["model.safetensors"] if shards == 1 else [
            f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        place, weight_map, total = {}, {}, 0
        for i, file in enumerate(files):
            header, data = {"__metadata__": {"format": "pt"}}, b""
            for name in names[cuts[i]:cuts[i + 1]]:
                dtype, shape, raw = self.files[name]
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
                data += raw
                weight_map[name] = file
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8 + header_pad)
            with open(os.path.join(folder, file), "wb") as f:
                f.write(struct.pack("<Q", len(text)) + text + data)
            for name in names[cuts[i]:cuts[i + 1]]:
                place[name] = (i, 8 + len(text) + header[name]["data_offsets"][0])
            total += len(data)
        if shards > 1:
            write_json(folder, "model.safetensors.index.json",
                       {"metadata": {"total_size": total}, "weight_map": weight_map})
        return files, self.table(place)

    def table(self, place):
        rows = []
        for name, (file_name, first, shape) in sorted(self.canonical.items()):
            dtype, stored, raw = self.files[file_name]
            row_bytes = len(raw) // stored[0]
            file, offset = place[file_name]
            rows.append({"name": name, "dtype": dtype.lower(), "shape": shape, "file": file,
                         "offset": offset + first * row_bytes, "bytes": shape[0] * row_bytes})
        return rows


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w") as f:
        f.write(json.dumps(value, indent=1) + "\n" if name != "native.json" else compact_table(value))


def compact_table(value):
    """One tensor a line, so that differences can be read."""
    lines = ",\n  ".join(json.dumps(t) for t in value["tensors"])
    return f'{{"spec": {json.dumps(value["spec"])},\n "files": {json.dumps(value["files"])},\n "tensors": [\n  {lines}\n ]}}\n'


# ---- weights under their published names -----------------------------------------------------

def add_decoder(c, s, prefix, head, group=0, bias_dtype=None, norm_dtype=None):
    hidden, d, inner = s["hiddenSize"], s["headDim"], s["intermediateSize"]
    bias = 0.3 if s["qkvBias"] else None

    def norm(file_name, size, name):
        c.put(file_name, (size,), 0.2, mean=1.0, dtype=norm_dtype, names=[name])

    c.put(prefix + "embed_tokens.weight", (s["vocabSize"], hidden), 0.5, names=["embed_tokens.weight"])
    for i in range(s["numLayers"]):
        to, frm = f"layers.{i}.", f"{prefix}layers.{i}."
        norm(frm + "input_layernorm.weight", hidden, to + "input_norm.weight")
        for part, heads in (("q", s["numHeads"]), ("k", s["numKvHeads"]), ("v", s["numKvHeads"])):
            c.linear(f"{frm}self_attn.{part}_proj", heads * d, hidden, f"{to}attn.{part}", 1.5, bias, group, bias_dtype)
        c.linear(frm + "self_attn.o_proj", hidden, s["numHeads"] * d, to + "attn.o", 1.5, None, group)
        if s["qkNorm"]:
            for part in "qk":
                norm(f"{frm}self_attn.{part}_norm.weight", d, f"{to}attn.{part}_norm.weight")
        norm(frm + "post_attention_layernorm.weight", hidden, to + "post_attention_norm.weight")
        for part, n, k in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            c.linear(f"{frm}mlp.{part}_proj", n, k, f"{to}mlp.{part}", 1.7, None, group)
    norm(prefix + "norm.weight", hidden, "norm.weight")
    if not s["tiedEmbeddings"]:
        c.put(head + ".weight", (s["vocabSize"], hidden), 0.5, names=["lm_head.weight"])


# canonical name -> name in either published layout; {i} is the layer
VISION_NAMES = {
    "hf": {"cls": "embeddings.cls_token", "positions": "embeddings.position_embeddings",
           "patch": "embeddings.patch_embeddings.projection", "layers": "encoder.layer.{i}.",
           "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.projection_layer",
           "q_norm": "attention.q_norm", "k_norm": "attention.k_norm", "scale1": "lambda_1", "scale2": "lambda_2",
           "projector": ["layer_norm", "linear_1", "linear_2"]},
    "chat": {"cls": "embeddings.class_embedding", "positions": "embeddings.position_embedding",
             "patch": "embeddings.patch_embedding", "layers": "encoder.layers.{i}.",
             "norm1": "norm1", "norm2": "norm2", "attn.proj": "attn.proj",
             "q_norm": "attn.q_norm", "k_norm": "attn.k_norm", "scale1": "ls1", "scale2": "ls2",
             "projector": ["0", "1", "3"]},
}


def add_vision(c, v, hidden_out, layout, vision, projector):
    names, width, patch = VISION_NAMES[layout], v["hiddenSize"], v["patchSize"]
    patches = (v["imageSize"] // patch) ** 2
    qkv_bias = 0.3 if v["qkvBias"] else None

    def norm(file_prefix, size, name, rms):
        c.put(file_prefix + ".weight", (size,), 0.2, mean=1.0, names=[name + ".weight"])
        if not rms:
            c.put(file_prefix + ".bias", (size,), 0.1, names=[name + ".bias"])

    c.put(vision + names["cls"], (1, 1, width), 0.5, names=["vision.cls"])
    c.put(vision + names["positions"], (1, patches + 1, width), 0.5, names=["vision.positions"])
    c.put(vision + names["patch"] + ".weight", (width, 3, patch, patch), 1 / math.sqrt(3 * patch * patch),
          names=["vision.patch.weight"])
    c.put(vision + names["patch"] + ".bias", (width,), 0.1, names=["vision.patch.bias"])
    for i in range(v["numLayers"]):
        to, frm = f"vision.layers.{i}.", vision + names["layers"].format(i=i)
        norm(frm + names["norm1"], width, to + "norm1", v["rmsNorm"])
        qkv = [to + "attn." + part for part in "qkv"]
        if layout == "chat":                      # rows of q, then of k, then of v
            c.put(frm + "attn.qkv.weight", (3 * width, width), 1.5 / math.sqrt(width), names=[n + ".weight" for n in qkv])
            if qkv_bias:
                c.put(frm + "attn.qkv.bias", (3 * width,), qkv_bias, names=[n + ".bias" for n in qkv])
        else:
            for name in qkv:
                c.linear(f"{frm}attention.{name[-1]}_proj", width, width, name, 1.5, qkv_bias)
        if v["qkNorm"]:
            for part in ("q_norm", "k_norm"):
                norm(frm + names[part], width, f"{to}attn.{part}", True)
        c.linear(frm + names["attn.proj"], width, width, to + "attn.proj", 1.0, 0.1)
        norm(frm + names["norm2"], width, to + "norm2", v["rmsNorm"])
        c.linear(frm + "mlp.fc1", v["intermediateSize"], width, to + "mlp.fc1", 1.5, 0.1)
        c.linear(frm + "mlp.fc2", width, v["intermediateSize"], to + "mlp.fc2", 1.0, 0.1)
        for scale in ("scale1", "scale2"):
            c.put(frm + names[scale], (width,), 0.2, mean=0.8, names=[to + scale])
    merged = v["shuffleFactor"] ** 2 * width
    first, second, third = (projector + part for part in names["projector"])
    norm(first, merged, "projector.norm", False)
    c.linear(second, hidden_out, merged, "projector.fc1", 1.5, 0.1)
    c.linear(third, hidden_out, hidden_out, "projector.fc2", 1.0, 0.1)


# ---- the networks, in float64 --------------------------------------------------------------------

def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def affine(w, name, x):
    y = x @ w[name + ".weight"].reshape(w[name + ".weight"].shape[0], -1).T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def rotate(x, theta):
    """x: [T, heads, D]; the pairs are (i, i + D / 2)."""
    t, _, d = x.shape
    angle = np.arange(t)[:, None, None] * theta ** (-np.arange(0, d, 2) / d)
    low, high = x[..., :d // 2], x[..., d // 2:]
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], -1)


def decoder_logits(s, w, ids, embeddings):
    """Logits after the last of ids; rows of `embeddings` stand in for image tokens."""
    x = w["embed_tokens.weight"][ids].copy()
    if embeddings is not None:
        places = [i for i, token in enumerate(ids) if token == IMAGE]
        x[places[:len(embeddings)]] = embeddings       # a generated id is never an image
    t, d, eps = len(ids), s["headDim"], s["normEps"]
    future = np.triu(np.full((t, t), -np.inf), 1)
    for i in range(s["numLayers"]):
        p = f"layers.{i}."
        y = rms(x, w[p + "input_norm.weight"], eps)
        q, k, v = (affine(w, p + "attn." + part, y).reshape(t, -1, d) for part in "qkv")
        if s["qkNorm"]:
            q, k = rms(q, w[p + "attn.q_norm.weight"], eps), rms(k, w[p + "attn.k_norm.weight"], eps)
        q, k = rotate(q, s["ropeTheta"]), rotate(k, s["ropeTheta"])
        share = s["numHeads"] // s["numKvHeads"]
        k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
        a = softmax(np.einsum("qhd,khd->hqk", q, k) / math.sqrt(d) + future)
        x = x + affine(w, p + "attn.o", np.einsum("hqk,khd->qhd", a, v).reshape(t, -1))
        y = rms(x, w[p + "post_attention_norm.weight"], eps)
        gate = affine(w, p + "mlp.gate", y)
        x = x + affine(w, p + "mlp.down", gate / (1 + np.exp(-gate)) * affine(w, p + "mlp.up", y))
    head = w["embed_tokens.weight" if s["tiedEmbeddings"] else "lm_head.weight"]
    return rms(x[-1], w["norm.weight"], eps) @ head.T


def tile_pixels(num_tiles, size):
    t, y, x, c = np.ogrid[:num_tiles, :size, :size, :3]
    return (71 * t + (3 + c) * y + (5 + t) * x + 40 * c) % 256


def vision_embeddings(v, w, num_tiles):
    size, patch, width = v["imageSize"], v["patchSize"], v["hiddenSize"]
    grid, heads, factor = size // patch, v["numHeads"], v["shuffleFactor"]
    pixels = (tile_pixels(num_tiles, size) / 255 - v["mean"]) / v["std"]

    def norm(x, name, is_rms):
        if is_rms:
            return rms(x, w[name + ".weight"], v["normEps"])
        return layer_norm(x, w[name + ".weight"], w[name + ".bias"], v["normEps"])

    rows = []
    for tile in pixels:
        patches = tile.reshape(grid, patch, grid, patch, 3).transpose(0, 2, 4, 1, 3).reshape(grid * grid, -1)
        x = np.concatenate([w["vision.cls"][0], affine(w, "vision.patch", patches)]) + w["vision.positions"][0]
        for i in range(v["numLayers"]):
            p = f"vision.layers.{i}."
            y = norm(x, p + "norm1", v["rmsNorm"])
            q, k, val = (affine(w, p + "attn." + part, y) for part in "qkv")
            if v["qkNorm"]:
                q, k = norm(q, p + "attn.q_norm", True), norm(k, p + "attn.k_norm", True)
            q, k, val = (a.reshape(len(x), heads, -1) for a in (q, k, val))
            a = softmax(np.einsum("qhd,khd->hqk", q, k) / math.sqrt(width // heads))
            x = x + w[p + "scale1"] * affine(w, p + "attn.proj", np.einsum("hqk,khd->qhd", a, val).reshape(len(x), -1))
            y = gelu(affine(w, p + "mlp.fc1", norm(x, p + "norm2", v["rmsNorm"])))
            x = x + w[p + "scale2"] * affine(w, p + "mlp.fc2", y)
        side = grid // factor
        x = x[1:].reshape(side, factor, side, factor, width).transpose(0, 2, 1, 3, 4).reshape(side * side, -1)
        y = layer_norm(x, w["projector.norm.weight"], w["projector.norm.bias"], v["projectorNormEps"])
        rows.append(affine(w, "projector.fc2", gelu(affine(w, "projector.fc1", y))))
    return np.concatenate(rows)


# ---- cases -----------------------------------------------------------------------------------------

def run_case(spec, w, ids, num_tiles):
    s = spec["decoder"]
    embeddings = vision_embeddings(spec["vision"], w, num_tiles) if num_tiles else None
    out, first, margin = [], None, math.inf
    while len(out) < NEW_TOKENS:
        logits = decoder_logits(s, w, ids + out, embeddings)
        best = np.sort(logits)
        margin = min(margin, best[-1] - best[-2])
        first = logits if first is None else first
        out.append(int(logits.argmax()))
    case = {"input_ids": ids, "tiles": num_tiles}
    if num_tiles:
        case["embeddings"] = [[round(float(x), 6) for x in row] for row in embeddings]
    case |= {"logits": [round(float(x), 5) for x in first], "output_ids": out, "min_margin": round(float(margin), 4)}
    return case


def make_cases(spec, w, seed):
    """Prompts of several lengths whose greedy steps all have a clear winner."""
    random = np.random.RandomState(seed)
    kinds = [(1, 0), (6, 0), (23, 0)]
    if "vision" in spec:
        kinds = [(9, 0), (7, 1), (11, 3)]
    cases = []
    for length, num_tiles in kinds:
        for _ in range(200):
            ids = [int(x) for x in random.randint(0, 256, length)]
            if num_tiles:
                v = spec["vision"]
                per_tile = (v["imageSize"] // v["patchSize"] // v["shuffleFactor"]) ** 2
                ids[3:3] = [259] + [IMAGE] * (per_tile * num_tiles) + [260]
            case = run_case(spec, w, ids, num_tiles)
            varied = len(set(case["output_ids"])) >= 4
            if case["min_margin"] >= MIN_MARGIN and varied and not set(case["output_ids"]) & {256, EOS, IMAGE}:
                break
        else:
            raise SystemExit(f"no clear prompt of length {length}: choose another seed")
        cases.append(case)
    return cases


# ---- folders ---------------------------------------------------------------------------------------

TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def decoder_spec(**changes):
    return {"hiddenSize": 64, "numLayers": 2, "numHeads": 4, "numKvHeads": 2, "headDim": 16, "intermediateSize": 96,
            "vocabSize": VOCAB, "maxPositionEmbeddings": 512, "normEps": 1e-6, "ropeTheta": 10000.0,
            "qkvBias": True, "qkNorm": False, "tiedEmbeddings": True} | changes


def vision_spec(**changes):
    return {"imageSize": 56, "patchSize": 14, "hiddenSize": 32, "numLayers": 2, "numHeads": 2, "intermediateSize": 48,
            "normEps": 1e-6, "rmsNorm": False, "qkvBias": True, "qkNorm": False, "shuffleFactor": 2,
            "projectorNormEps": 1e-5, "mean": MEAN, "std": STD} | changes


def decoder_config(s, dtype, family):
    config = {"architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]], "model_type": family,
              "torch_dtype": TORCH[dtype], "bos_token_id": 256, "eos_token_id": EOS, "hidden_act": "silu",
              "hidden_size": s["hiddenSize"], "intermediate_size": s["intermediateSize"],
              "max_position_embeddings": s["maxPositionEmbeddings"], "num_attention_heads": s["numHeads"],
              "num_hidden_layers": s["numLayers"], "num_key_value_heads": s["numKvHeads"], "rms_norm_eps": s["normEps"],
              "rope_theta": s["ropeTheta"], "tie_word_embeddings": s["tiedEmbeddings"], "use_sliding_window": False,
              "vocab_size": s["vocabSize"]}
    return config | ({"head_dim": s["headDim"], "attention_bias": False} if family == "qwen3" else {})


def awq_config(group):
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def finish(folder, c, spec, config, seed, shards=1, header_pad=0):
    write_json(folder, "config.json", config)
    write_json(folder, "generation_config.json", {"do_sample": False, "eos_token_id": [EOS, 256], "max_new_tokens": 64})
    files, tensors = c.write(folder, shards, header_pad)
    write_json(folder, "native.json", {"spec": spec, "files": files, "tensors": tensors})
    with open(os.path.join(folder, "expected.json"), "w") as f:
        cases = ",\n ".join(json.dumps(case) for case in make_cases(spec, c.values, seed))
        f.write(f'{{"cases": [\n {cases}\n]}}\n')


def make_decoder(folder, seed, dtype, family="qwen2", group=0, shards=1, header_pad=0, bias_dtype=None,
                 norm_dtype=None, **changes):
    s = decoder_spec(**changes)
    c = Checkpoint(seed, dtype)
    add_decoder(c, s, "model.", "lm_head", group, bias_dtype, norm_dtype)
    config = decoder_config(s, dtype, family)
    if group:
        config["quantization_config"] = awq_config(group)
    spec = {"decoder": s, "quant": {"method": "awq" if group else "none", "groupSize": group}, "imageTokenId": -1}
    finish(folder, c, spec, config, seed, shards, header_pad)


def make_internvl(folder, seed, layout, group=0, decoder=None, family="qwen2", **changes):
    s, v, dtype = decoder_spec(**(decoder or {})), vision_spec(**changes), "BF16"
    c = Checkpoint(seed, dtype)
    # "hf" as transformers >= 4.52 writes it
    prefix = {"hf": "model.language_model.", "chat": "language_model.model."}[layout]
    head = {"hf": "lm_head", "chat": "language_model.lm_head"}[layout]
    add_decoder(c, s, prefix, head, group, "F16" if group else None)
    add_vision(c, v, s["hiddenSize"], layout, {"hf": "model.vision_tower.", "chat": "vision_model."}[layout],
               {"hf": "model.multi_modal_projector.", "chat": "mlp1."}[layout])
    config = {"hf": hf_config, "chat": chat_config}[layout](s, v, dtype, family)
    if group:
        config["quantization_config"] = awq_config(group)
    if layout == "hf":
        size = v["imageSize"]
        write_json(folder, "preprocessor_config.json", {
            "image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": True, "do_convert_rgb": True,
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN, "image_std": STD,
            "max_patches": 12, "min_patches": 1, "resample": 3, "size": {"height": size, "width": size}})
    # Where the chat layout has its image token from; the tokenizer folder holds the same.
    write_json(folder, "added_tokens.json", SPECIAL_TOKENS)
    spec = {"decoder": s, "vision": v, "quant": {"method": "awq" if group else "none", "groupSize": group},
            "imageTokenId": IMAGE}
    finish(folder, c, spec, config, seed)


def hf_config(s, v, dtype, family):
    tokens = (v["imageSize"] // v["patchSize"] // v["shuffleFactor"]) ** 2
    return {"architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "torch_dtype": TORCH[dtype],
            "downsample_ratio": 1 / v["shuffleFactor"], "image_seq_length": tokens, "image_token_id": IMAGE,
            "projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
            "tie_word_embeddings": s["tiedEmbeddings"], "text_config": decoder_config(s, dtype, family),
            "vision_config": {
                "architectures": ["InternVLVisionModel"], "model_type": "internvl_vision", "attention_bias": v["qkvBias"],
                "hidden_act": "gelu", "hidden_size": v["hiddenSize"], "image_size": [v["imageSize"]] * 2,
                "intermediate_size": v["intermediateSize"], "layer_norm_eps": v["normEps"],
                "norm_type": "rms_norm" if v["rmsNorm"] else "layer_norm", "num_attention_heads": v["numHeads"],
                "num_channels": 3, "num_hidden_layers": v["numLayers"], "patch_size": [v["patchSize"]] * 2,
                "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
                "use_qk_norm": v["qkNorm"]}}


def chat_config(s, v, dtype, family):
    return {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "torch_dtype": TORCH[dtype],
            "downsample_ratio": 1 / v["shuffleFactor"], "dynamic_image_size": True, "force_image_size": v["imageSize"],
            "max_dynamic_patch": 12, "min_dynamic_patch": 1, "pad2square": False, "ps_version": "v2", "select_layer": -1,
            "template": "internvl2_5", "use_thumbnail": True, "llm_config": decoder_config(s, dtype, family),
            "vision_config": {
                "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_act": "gelu",
                "hidden_size": v["hiddenSize"], "image_size": v["imageSize"], "intermediate_size": v["intermediateSize"],
                "layer_norm_eps": v["normEps"], "norm_type": "rms_norm" if v["rmsNorm"] else "layer_norm",
                "num_attention_heads": v["numHeads"], "num_channels": 3, "num_hidden_layers": v["numLayers"],
                "patch_size": v["patchSize"], "qk_normalization": v["qkNorm"], "qkv_bias": v["qkvBias"]}}


NARROW = {"hiddenSize": 32, "numHeads": 2, "numKvHeads": 1, "intermediateSize": 48}

FOLDERS = {
    "qwen2-bf16-sharded": lambda f: make_decoder(f, 11, "BF16", shards=2, hiddenSize=48, numHeads=3, numKvHeads=1, intermediateSize=80),
    "qwen2-f32": lambda f: make_decoder(f, 12, "F32", ropeTheta=1000000.0, **NARROW | {"numLayers": 1}),
    # f16 matrices, f32 norms, bf16 biases, and every tensor at an odd offset
    "qwen2-mixed-unaligned": lambda f: make_decoder(f, 13, "F16", header_pad=3, norm_dtype="F32", bias_dtype="BF16", **NARROW),
    "qwen2-awq-g32": lambda f: make_decoder(f, 14, "BF16", group=32, bias_dtype="F16", **NARROW | {"intermediateSize": 64}),
    "qwen2-awq-g128": lambda f: make_decoder(f, 16, "F16", group=128, hiddenSize=128, headDim=64, numHeads=2,
                                             numKvHeads=1, intermediateSize=128, numLayers=1),
    # heads wider than hidden / heads
    "qwen3-bf16": lambda f: make_decoder(f, 17, "BF16", family="qwen3", qkvBias=False, qkNorm=True,
                                         tiedEmbeddings=False, **NARROW | {"headDim": 32}),
    "internvl-hf-bf16": lambda f: make_internvl(f, 18, "hf", decoder=NARROW),
    "internvl-chat-awq": lambda f: make_internvl(f, 19, "chat", group=32, imageSize=16, patchSize=8, decoder=NARROW | {
        "tiedEmbeddings": False, "intermediateSize": 64}),
    # InternViT-6B: RMSNorm, q and k normalised over all heads, no qkv bias
    "internvl-chat-rms": lambda f: make_internvl(f, 20, "chat", rmsNorm=True, qkNorm=True, qkvBias=False, imageSize=32,
                                                 patchSize=8, decoder=NARROW | {"tiedEmbeddings": False}),
}


def write_all(root):
    for name, make in FOLDERS.items():
        folder = os.path.join(root, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        make(folder)
        size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
        print(f"{name}: {size} bytes")


def check(root):
    """The byte-exact files must be equal; outputs may differ in the last digit between libraries."""
    with tempfile.TemporaryDirectory() as fresh:
        write_all(fresh)
        different = []
        for folder, _, files in os.walk(fresh):
            for file in files:
                path = os.path.join(folder, file)
                old = os.path.join(root, os.path.relpath(path, fresh))
                same = os.path.exists(old) and open(old, "rb").read() == open(path, "rb").read()
                if not same and file != "expected.json":
                    different.append(os.path.relpath(path, fresh))
        if different:
            raise SystemExit("different from what this script writes: " + ", ".join(different))


if __name__ == "__main__":
    (check if "--check" in sys.argv[1:] else write_all)(os.path.normpath(ROOT))
