"""From trained weights to the folders bf16/ and awq/ in Hugging Face layout, compared with transformers where it is installed.

    python finish.py --weights PREFIX --fonts DIR ... --out DIR [--evaluate 1.0]
"""
import argparse
import json
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "4")

import numpy as np
import torch

import awq
import evaluate
import export
import render
import samples
import train
from model import TEXT, TinyInternVL
from preprocess import normalise


def calibration(fonts, n=48):
    """Examples with answers (one tile, several tiles, chat) for the activation statistics."""
    s = samples.Sampler(4242, fonts)
    return [s.example(*make()) for make, count in ((lambda: s.single(1.0), n), (lambda: s.multi(5, 1.0), n // 4), (s.text_chat, n))
            for _ in range(count)]


def activations(net, examples, device):
    """Inputs of the decoder's linear layers: every text token and a sample of the image tokens."""
    img = samples.byte_ids()[1]["<IMG_CONTEXT>"]

    def run(net):
        keep, base, g = [], 0, torch.Generator().manual_seed(0)
        for e in examples:
            ids = torch.from_numpy(e.ids).long()
            vis = None
            if e.tiles:
                px = torch.from_numpy(normalise(np.concatenate(e.tiles))).to(device)
                vis = net.model.multi_modal_projector(net.model.vision_tower(px))
            net.model.language_model(net.embed(ids[None].to(device), vis, img))
            at = (ids != img).nonzero().squeeze(1)
            pictures = (ids == img).nonzero().squeeze(1)
            keep += [at + base, pictures[torch.randperm(len(pictures), generator=g)[:40]] + base]
            base += len(ids)
        keep = torch.cat(keep)
        return keep[torch.randperm(len(keep), generator=g)].to(device)
    return awq.capture(net, run, 12000)


def difference_to_transformers(folder, state, net, example, device):
    """Largest difference of a logit between model.py and transformers' own model, both in float32."""
    from transformers import AutoConfig, InternVLForConditionalGeneration
    cfg = AutoConfig.from_pretrained(folder)
    cfg.dtype = cfg.text_config.dtype = cfg.vision_config.dtype = torch.float32
    if hasattr(cfg, "quantization_config"):
        del cfg.quantization_config
    m = InternVLForConditionalGeneration(cfg).float()
    missing, extra = m.load_state_dict(state, strict=False)
    assert not extra and all("lm_head" in k for k in missing), (missing, extra)
    m.tie_weights()
    m = m.to(device).eval()
    px = torch.from_numpy(normalise(np.concatenate(example.tiles))).to(device)
    ids = torch.from_numpy(example.ids).long()[None].to(device)
    img = samples.byte_ids()[1]["<IMG_CONTEXT>"]
    with torch.no_grad():
        mine = net.logits(net.model.language_model(net.embed(ids, net.model.multi_modal_projector(net.model.vision_tower(px)), img)))
        return (mine - m(input_ids=ids, pixel_values=px).logits).abs().max().item()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--weights", required=True)
    ap.add_argument("--fonts", nargs="+", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--evaluate", type=float, default=0.0, help="size of the held-out set, 1.0 is about 3,000 questions")
    a = ap.parse_args()
    began = time.time()
    say = lambda *x: print("[%5.1fs]" % (time.time() - began), *x, flush=True)
    fonts = render.find_fonts(*a.fonts)
    items = evaluate.build_parallel(fonts, a.evaluate) if a.evaluate else []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = lambda name: os.path.join(a.out, name)
    state = {k: v for k, v in train.load(a.weights).items() if "aux_" not in k}
    export.write_bf16(folder("bf16"), state, samples.TOKENIZER)
    net = TinyInternVL()
    net.load_state_dict(state)
    net.to(device).eval()

    examples = calibration(fonts)
    with torch.no_grad():
        acts = activations(net, examples, device)
    packed, deq = awq.quantise({k: v.to(device) for k, v in state.items()}, acts, TEXT["layers"], say)
    deq = {k: v.cpu() for k, v in deq.items()}
    for k, v in deq.items():                                    # what the file holds: bias fp16, the rest bf16
        if not any(k.endswith(n + ".weight") for n in awq.LINEARS):
            deq[k] = v.half().float() if k.endswith("_proj.bias") and "language_model" in k else v.bfloat16().float()
    export.write_awq(folder("awq"), deq, packed, samples.TOKENIZER)
    quantised = TinyInternVL()
    quantised.load_state_dict(deq)
    quantised.to(device).eval()
    say("written; awq has %d bytes" % os.path.getsize(os.path.join(folder("awq"), "model.safetensors")))
    try:
        probe = next(e for e in examples if e.tiles and len(e.tiles[0]) > 2)
        for name, s, n in (("bf16", state, net), ("awq", deq, quantised)):
            say("%s: largest logit difference to transformers %.1e" % (name, difference_to_transformers(folder(name), s, n, probe, device)))
    except ImportError:
        say("transformers is not installed: not compared")

    reports = {}
    for name, n in (("bf16", net), ("awq", quantised)) if items else ():
        reports[name] = evaluate.score(n, items, device)[0]
        say(name, json.dumps(reports[name]))
    if items:
        with open(folder("accuracy.json"), "w") as f:
            json.dump(reports, f, indent=1)


if __name__ == "__main__":
    main()
