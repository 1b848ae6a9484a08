"""Float32 reference outputs from the finished folders, without transformers: reads bf16/ and awq/ (its own reading of the AWQ
packing), decodes the cases of a golden.json greedily and writes them with new outputs.

    python reference.py --models DIR --golden DIR/golden.json --out FILE

The pictures lie beside golden.json. The network equals transformers' (finish.py prints the difference).
"""
import argparse
import hashlib
import json
import os
import struct

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Tokenizer

import export
import samples
from model import TEXT, TinyInternVL
from preprocess import normalise, tiles_of

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]                                # output column held by each nibble of an int32


def read_safetensors(path):
    raw = open(path, "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8:8 + n])
    out = {}
    for k, e in head.items():
        if k == "__metadata__":
            continue
        b, t = e["data_offsets"]
        buf = raw[8 + n + b:8 + n + t]
        if e["dtype"] == "BF16":
            a = (np.frombuffer(buf, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            a = np.frombuffer(buf, {"F32": np.float32, "F16": np.float16, "I32": np.int32}[e["dtype"]])
        out[k] = a.reshape(e["shape"])
    return out


def nibbles(packed):
    """int32 [R, N / 8] -> [R, N] in column order."""
    u = packed.view(np.uint32)
    cols = np.empty(u.shape + (8,), np.float32)
    for place, column in enumerate(AWQ_ORDER):
        cols[..., column] = (u >> (4 * place)) & 15
    return cols.reshape(u.shape[0], -1)


def load(folder):
    """Float32 state dict of TinyInternVL from a folder in Hugging Face layout, dense or AWQ."""
    t = read_safetensors(os.path.join(folder, "model.safetensors"))
    for k in [k for k in t if k.endswith(".qweight")]:
        base = k[:-len(".qweight")]
        q, z, s = nibbles(t.pop(k)), nibbles(t.pop(base + ".qzeros")), t.pop(base + ".scales").astype(np.float32)
        g = q.shape[0] // s.shape[0]
        t[base + ".weight"] = ((q - z.repeat(g, 0)) * s.repeat(g, 0)).T       # [out, in]
    names = {export.hub_name(k): k for k in TinyInternVL().state_dict()}
    return {names[k]: torch.from_numpy(np.ascontiguousarray(v.astype(np.float32))) for k, v in t.items()}


class Reference:
    def __init__(self, models_dir):
        self.tok = Tokenizer.from_file(os.path.join(models_dir, "bf16", "tokenizer.json"))
        self.models = {}
        for name in ("bf16", "awq"):
            net = TinyInternVL().eval()
            net.load_state_dict(load(os.path.join(models_dir, name)))
            self.models[name] = net

    def open(self, path):
        """EXIF orientation applied, then RGB (alpha dropped, grey and palette expanded) as PIL's convert does."""
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")

    def prompt(self, messages, counts):
        """(chat template output, prompt with every image expanded to its tokens)"""
        t = ""
        for m in messages:
            t += "<|im_start|>" + m["role"] + "\n"
            for c in m["content"]:
                t += "<IMG_CONTEXT>\n" if c["type"] == "image" else c["text"]
            t += "<|im_end|>\n"
        t += "<|im_start|>assistant\n"
        parts = t.split("<IMG_CONTEXT>")
        full = parts[0]
        for c, p in zip(counts, parts[1:]):
            full += "<img>" + "<IMG_CONTEXT>" * (samples.TILE_TOKENS * c) + "</img>" + p
        return t, full

    @torch.no_grad()
    def generate(self, net, ids, px, max_new):
        img, end = self.tok.token_to_id("<IMG_CONTEXT>"), self.tok.token_to_id("<|im_end|>")
        stop = {end, self.tok.token_to_id("<|endoftext|>")}
        lm = net.model.language_model
        vis = None
        if px is not None:
            vis = torch.cat([net.model.multi_modal_projector(net.model.vision_tower(c)) for c in torch.from_numpy(px).split(4)])
        x = net.embed(torch.tensor([ids]), vis, img)
        cache = [[None, None] for _ in lm.layers]
        out, rows, pos = [], [], 0
        while True:
            n = x.shape[1]
            cos, sin = lm.cos[pos:pos + n], lm.sin[pos:pos + n]
            for layer, kv in zip(lm.layers, cache):
                x = self.layer(layer, x, cos, sin, kv)
            pos += n
            rows.append(net.logits(lm.norm(x[:, -1]))[0])
            out.append(int(rows[-1].argmax()))
            if out[-1] in stop or len(out) == max_new:
                break
            x = lm.embed_tokens(torch.tensor([[out[-1]]]))
        top = torch.stack(rows).topk(5, -1)
        return {"output_ids": out, "text": self.tok.decode(out, skip_special_tokens=True),
                "first_top5": [{"id": int(i), "token": self.tok.id_to_token(int(i)), "logit": round(float(v), 5)}
                               for i, v in zip(top.indices[0], top.values[0])],
                "min_margin": round(float((top.values[:, 0] - top.values[:, 1]).min()), 5), "finished": out[-1] == end}

    @staticmethod
    def layer(layer, x, cos, sin, kv):
        a = layer.self_attn
        b, n, h = x.shape
        y = layer.input_layernorm(x)
        split = lambda t, k: t.view(b, n, k, a.dim).transpose(1, 2)
        rot = lambda t: torch.cat([-t[..., a.dim // 2:], t[..., :a.dim // 2]], -1)
        q, k, v = split(a.q_proj(y), a.heads), split(a.k_proj(y), a.kv), split(a.v_proj(y), a.kv)
        q, k = q * cos + rot(q) * sin, k * cos + rot(k) * sin
        kv[0] = k if kv[0] is None else torch.cat([kv[0], k], 2)
        kv[1] = v if kv[1] is None else torch.cat([kv[1], v], 2)
        g = a.heads // a.kv
        o = F.scaled_dot_product_attention(q, kv[0].repeat_interleave(g, 1), kv[1].repeat_interleave(g, 1), is_causal=n > 1)
        x = x + a.o_proj(o.transpose(1, 2).reshape(b, n, h))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def item(self, ident, folder, files, messages, want, max_new=64):
        cut = [tiles_of(self.open(os.path.join(folder, f))) for f in files]
        t, full = self.prompt(messages, [len(c[0]) for c in cut])
        ids = self.tok.encode(full, add_special_tokens=False).ids
        px = np.concatenate([normalise(c[0]) for c in cut]) if cut else None
        rec = {"id": ident, "images": files, "messages": messages, "chat_template_output": t, "prompt": full, "input_ids": ids,
               "grids": [{"columns": c[1][0], "rows": c[1][1], "tiles": len(c[0])} for c in cut], "true_answer": want}
        for name, net in self.models.items():
            rec[name] = self.generate(net, ids, px, max_new)
        return rec


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--models", required=True)
    ap.add_argument("--golden", required=True, help="the cases: pictures, messages and true answers are taken from it")
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    ref = Reference(a.models)
    with open(a.golden) as f:
        old = json.load(f)["items"]
    items = [ref.item(x["id"], os.path.dirname(a.golden), x["images"], x["messages"], x["true_answer"]) for x in old]
    digest = {}
    for name in ref.models:
        with open(os.path.join(a.models, name, "model.safetensors"), "rb") as f:
            digest[name] = hashlib.sha256(f.read()).hexdigest()
    about = ("float32 reference outputs of greedy decoding; images through the PIL path (EXIF orientation, RGB, bicubic); 'awq' uses the "
             "dequantised weights in float32. min_margin is the smallest gap between the best and the second logit along the output; "
             "weights = sha256 of the files that gave them.")
    with open(a.out, "w") as f:
        json.dump({"about": about, "weights": digest, "items": items}, f, ensure_ascii=False)
    for name in ref.models:
        known = [x for x in items if x["true_answer"] is not None]
        print(name, "right: %d of %d" % (sum(x[name]["text"] == x["true_answer"] for x in known), len(known)),
              "smallest margin %.5f" % min(x[name]["min_margin"] for x in items), flush=True)
    for x in items:
        if x["true_answer"] != x["awq"]["text"]:
            print("  %-28s %r %r" % (x["id"][:28], x["true_answer"], x["awq"]["text"][:90]))


if __name__ == "__main__":
    main()
