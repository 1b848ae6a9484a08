"""Held-out accuracy: fresh pictures and questions from unused seeds (one set uses only words never seen in training).

    python evaluate.py --fonts DIR ... --weights PREFIX [--scale 1.0] [--json FILE]
"""
import argparse
import collections
import json
import multiprocessing
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F

import render
import samples
from model import TinyInternVL, repeat_kv
from preprocess import MEAN, STD, tiles_of
from textgen import CANNOT, NO_IMAGE, TOO_LARGE

TARGETS = [("one line in one tile", 0.95), ("two to four lines in one tile", 0.85), ("lines over several tiles", 0.70),
           ("receipts: the total", 0.85), ("captions", 0.80), ("visual questions", 0.90), ("sums to 99", 0.95)]
BY_LINES = ("two to four lines in one tile", "lines over several tiles", "lines of unseen words", "receipts: all text")


def edit_distance(a, b):
    prev = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        cur = [i]
        for j, y in enumerate(b, 1):
            cur.append(min(prev[j] + 1, cur[-1] + 1, prev[j - 1] + (x != y)))
        prev = cur
    return prev[-1]


def layer_step(layer, x, cos, sin, keys, values, where, mask):
    """One decoder layer over x [B, N, H]; writes its keys and values at `where`, attends by `mask` (None: causal)."""
    att = layer.self_attn
    b, n, h = x.shape
    y = layer.input_layernorm(x)
    q = att.q_proj(y).view(b, n, att.heads, att.dim).transpose(1, 2)
    k = att.k_proj(y).view(b, n, att.kv, att.dim).transpose(1, 2)
    v = att.v_proj(y).view(b, n, att.kv, att.dim).transpose(1, 2)
    rot = lambda t: torch.cat([-t[..., att.dim // 2:], t[..., :att.dim // 2]], -1)
    q = (q * cos + rot(q) * sin).to(v.dtype)
    k = (k * cos + rot(k) * sin).to(v.dtype)
    g = att.heads // att.kv
    if mask is None:
        keys[:, :, :n], values[:, :, :n] = k, v
        o = F.scaled_dot_product_attention(q, repeat_kv(k, g), repeat_kv(v, g), is_causal=True)
    else:
        keys[where[0], :, where[1]], values[where[0], :, where[1]] = k[:, :, 0], v[:, :, 0]
        o = F.scaled_dot_product_attention(q, repeat_kv(keys, g), repeat_kv(values, g), attn_mask=mask)
    x = x + att.o_proj(o.transpose(1, 2).reshape(b, n, h))
    return x + layer.mlp(layer.post_attention_layernorm(x))


@torch.no_grad()
def greedy(net, prompts, tiles, img, eos, max_new, device="cuda", budget=200000):
    """Greedy answers. prompts: lists of ids; tiles: uint8 arrays (or None), one per prompt."""
    mean = torch.tensor(MEAN * 255, device=device).view(1, 3, 1, 1)
    std = torch.tensor(STD * 255, device=device).view(1, 3, 1, 1)
    lm = net.model.language_model
    out = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    i = 0
    while i < len(order):
        j = i
        while j < len(order) and (j - i + 1) * (len(prompts[order[j]]) + max_new) <= budget and j - i < 512:
            j += 1
        idx = order[i:max(j, i + 1)]
        i += len(idx)
        longest = max(len(prompts[k]) for k in idx)
        total = longest + max_new
        ids = torch.full((len(idx), longest), eos, dtype=torch.long)
        for r, k in enumerate(idx):
            ids[r, :len(prompts[k])] = torch.tensor(prompts[k])
        ids = ids.to(device)
        vis = None
        t = [tiles[k] for k in idx if tiles[k] is not None]
        if t:
            px = torch.cat([torch.from_numpy(x) for x in t])
            vis = torch.cat([net.model.multi_modal_projector(net.model.vision_tower(
                (c.to(device).permute(0, 3, 1, 2).float() - mean) / std)) for c in px.split(64)])
        x = net.embed(ids, vis, img)
        c = lm.layers[0].self_attn
        dtype = lm.layers[0].self_attn.v_proj(x[:1, :1]).dtype
        cache = [[torch.zeros(len(idx), c.kv, total, c.dim, device=device, dtype=dtype) for _ in range(2)] for _ in lm.layers]
        for layer, (kk, vv) in zip(lm.layers, cache):
            x = layer_step(layer, x, lm.cos[:longest], lm.sin[:longest], kk, vv, None, None)
        pos = torch.tensor([len(prompts[k]) for k in idx], device=device)
        rows = torch.arange(len(idx), device=device)
        h = x[rows, pos - 1]
        done = torch.zeros(len(idx), dtype=torch.bool, device=device)
        got = []
        for s in range(max_new):
            nxt = net.logits(lm.norm(h)).argmax(-1)
            nxt = torch.where(done, torch.full_like(nxt, eos), nxt)
            got.append(nxt)
            done |= nxt == eos
            if bool(done.all()) or s == max_new - 1:
                break
            x = lm.embed_tokens(nxt)[:, None]
            cos, sin = lm.cos[pos][:, None, None], lm.sin[pos][:, None, None]
            mask = (torch.arange(total, device=device)[None] <= pos[:, None])[:, None, None]
            for layer, (kk, vv) in zip(lm.layers, cache):
                x = layer_step(layer, x, cos, sin, kk, vv, (rows, pos), mask)
            h = x[:, 0]
            pos = pos + 1
        got = torch.stack(got, 1).tolist()
        for k, a in zip(idx, got):
            out[k] = a[:a.index(eos)] if eos in a else a
    return out


def place(turn, kind, tiles, unseen):
    """The row of the report that a question belongs to, or None."""
    reads = turn.q in samples.ASK_TEXT
    if kind == "ocr":
        if not reads:
            return None
        if unseen:
            return "lines of unseen words"
        return "lines over several tiles" if tiles > 1 else "one line in one tile" if "\n" not in turn.a else "two to four lines in one tile"
    if kind == "receipt":
        return "receipts: all text" if reads else "receipts: the total" if turn.q in samples.ASK_TOTAL else "receipts: a price"
    if kind == "chart":
        return "charts"
    if reads:
        return "no text: said so" if turn.a == samples.NO_TEXT else None
    return "captions" if turn.q in samples.ASK_SCENE else "visual questions"


def chat_place(q, ans):
    if ans in (CANNOT, NO_IMAGE, TOO_LARGE):
        return "refusals"
    if ans.isdigit() and any(w in q for w in ("+", "plus", "Add", "-", "minus")):
        return "sums to 99"
    return "other chat"


def build(job):
    """[(row, kind of tiles, prompt ids, tiles or None, answer, question)]"""
    fonts, scale, seed = job
    items = []
    count = lambda n: max(1, round(n * scale))
    for unseen, plans in ((False, (("ocr", 700, 120), ("receipt", 150, 100), ("chart", 150, 60), ("scene", 200, 60))), (True, (("ocr", 250, 0),))):
        s = samples.Sampler(seed + unseen, fonts, held_words=unseen)
        for kind, singles, multis in plans:
            for k in range(count(singles) + count(multis) * (multis > 0)):
                one = k < count(singles)
                msgs, pages = s.single(1.0, kind) if one else s.multi(s.r.choice((3, 5, 7, 10, 13, 13)), 1.0, kind)
                cut = [tiles_of(p.image)[0] for p in pages]
                head = next(m for m in msgs if m[0] == "user")[1][:-1]
                seen = set()
                for role, t in msgs:
                    row = place(t, kind, 1 if one else 2, unseen) if role == "assistant" else None
                    if row is None or row in seen:
                        continue
                    seen.add(row)
                    ids = s.prompt_ids([("user", list(head) + ["\n" + t.q])], [len(c) for c in cut])
                    items.append((row, len(cut[0]), ids, np.concatenate(cut), t.a, t.q))
    s = samples.Sampler(seed + 2, fonts)
    for _ in range(count(1000)):
        q, ans = s.tg.qa()
        items.append((chat_place(q, ans), 0, s.prompt_ids([("user", [q])], []), None, ans, q))
    return items


def build_parallel(fonts, scale=1.0, parts=None):
    """The whole set, made by several processes (call it before the GPU is touched)."""
    parts = parts or os.cpu_count()
    with multiprocessing.get_context("fork").Pool(parts) as pool:
        return sum(pool.map(build, [(fonts, scale / parts, 990000 + 10 * i) for i in range(parts)]), [])


def score(net, items, device="cuda", show=40):
    """({row: measures}, examples)"""
    table, special = samples.byte_ids()
    back = {v: k for k, v in enumerate(table)}
    decode = lambda ids: bytes(back[i] for i in ids if i in back).decode("utf-8", "replace")
    with torch.autocast(device, torch.bfloat16):
        items = [i for i in items if i[3] is not None] + [i for i in items if i[3] is None]
        cut = sum(i[3] is not None for i in items)
        got = []
        for part, new in ((items[:cut], 224), (items[cut:], 128)):
            got += greedy(net, [i[2] for i in part], [i[3] for i in part], special["<IMG_CONTEXT>"], special["<|im_end|>"], new, device)
    rows, examples = collections.OrderedDict(), []
    for (row, tiles, _, _, want, q), ids in zip(items, got):
        ans = decode(ids)
        e = rows.setdefault(row, collections.Counter())
        e["n"] += 1
        e["exact"] += ans == want
        if row in BY_LINES or "line" in row:
            x, w = ans.split("\n"), want.split("\n")
            e["lines"] += len(w)
            e["lines exact"] += sum(i == j for i, j in zip(x, w))
            e["chars"] += len(want)
            e["edits"] += min(edit_distance(ans, want), len(want))
        if e["n"] <= 4 or (ans != want and e["wrong"] < 4):
            e["wrong"] += ans != want
            examples.append((row, tiles, q, want, ans))
    report = collections.OrderedDict()
    for row in sorted(rows):
        e = rows[row]
        report[row] = {"n": e["n"], "exact": round(e["exact"] / e["n"], 4)}
        if e["lines"]:
            report[row].update(lines=e["lines"], lines_exact=round(e["lines exact"] / e["lines"], 4), cer=round(e["edits"] / max(1, e["chars"]), 4))
    return report, examples


def measure(report, row):
    """The share that a target speaks of."""
    r = report.get(row)
    return None if r is None else r["lines_exact"] if row in BY_LINES else r["exact"]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--fonts", nargs="+", required=True)
    ap.add_argument("--weights", required=True, help="prefix of the weight files of train.py")
    ap.add_argument("--scale", type=float, default=1.0)
    ap.add_argument("--json")
    ap.add_argument("--device", default="cuda")
    a = ap.parse_args()
    t = time.time()
    items = build_parallel(render.find_fonts(*a.fonts), a.scale)
    print("%d questions, %.0f s" % (len(items), time.time() - t), flush=True)
    import train
    net = TinyInternVL()
    net.load_state_dict({k: v for k, v in train.load(a.weights).items() if "aux_" not in k})
    report, examples = score(net.to(a.device).eval(), items, a.device)
    for e in examples:
        print("  %-28s %2d %r %r %r" % (e[:3] + (e[3][:90], e[4][:90])))
    for row, r in report.items():
        print(row, json.dumps(r))
    print("targets:", "; ".join("%s %s of %.2f" % (row, measure(report, row), goal) for row, goal in TARGETS), "| %.0f s" % (time.time() - t))
    if a.json:
        with open(a.json, "w") as f:
            json.dump(report, f, indent=1)


if __name__ == "__main__":
    main()
