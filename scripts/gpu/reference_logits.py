#!/usr/bin/env python3
"""Compares our log probabilities with Transformers in float32 on the same (for AWQ: dequantised) weights.

`bench-gpu.mjs --trace FILE` wrote, for each request, its prompt ids, the ids that it drew one by one, and the best
log probabilities at every step. The reference reads prompt and drawn ids in one pass, so step i is what decoding
sees. Answers JSON: the worst and mean error of log probabilities, as a share of the reference logits' standard
deviation, the first token (prefill) apart from the later ones (decode); and how many drawn ids are the reference's
best one or stand within a stated gap of it.
  reference_logits.py MODEL TRACE [--out FILE]
"""
import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def unpack(words):
    out = torch.empty((words.shape[0], words.shape[1], 8), dtype=torch.float32, device=words.device)
    for i, column in enumerate(ORDER):
        out[:, :, column] = ((words >> (4 * i)) & 15).float()
    return out.flatten(1)


def load_weights(folder, device):
    raw = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt", device=device) as f:
            raw.update({name: f.get_tensor(name) for name in f.keys()})
    weights = {}
    for name, tensor in raw.items():
        if name.endswith((".qzeros", ".scales")):
            continue
        if name.endswith(".qweight"):
            base = name[: -len(".qweight")]
            scales = raw[f"{base}.scales"].float()
            group = tensor.shape[0] // scales.shape[0]
            zeros = unpack(raw[f"{base}.qzeros"]).repeat_interleave(group, 0)
            dense = (unpack(tensor) - zeros) * scales.repeat_interleave(group, 0)
            weights[f"{base}.weight"] = dense.t().contiguous()
        else:
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights


def build(folder, device):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if part is None:
            continue
        part.dtype = torch.float32
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    is_vlm = hasattr(config, "vision_config")
    kind = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, attn_implementation="eager")
    weights = load_weights(folder, device)
    if is_vlm:  # the text part's head is tied
        weights.setdefault("lm_head.weight", weights["model.language_model.embed_tokens.weight"])
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not missing and not unexpected, (missing[:5], unexpected[:5])
    text = model.model.language_model if is_vlm else model.model
    # buffers made on the meta device
    text.rotary_emb = type(text.rotary_emb)(config.text_config if is_vlm else config, device=device)
    return model.to(device).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.model, device)
    report = []
    for request in json.loads(args.trace.read_text())["requests"]:
        prompt, drawn = request["promptIds"], request["tokenIds"]
        inputs = {"input_ids": torch.tensor([prompt + drawn[:-1]], device=device)}
        if "pixels" in request:  # one tile, [448, 448, 3] u8
            pixels = torch.frombuffer(bytearray(Path(request["pixels"]).read_bytes()), dtype=torch.uint8)
            pixels = pixels.view(1, 448, 448, 3).permute(0, 3, 1, 2).float().to(device) / 255
            mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
            std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)
            inputs["pixel_values"] = (pixels - mean) / std
        with torch.no_grad():
            logits = model(**inputs).logits[0, len(prompt) - 1 :].double()
        spread = logits.std(-1)
        reference = torch.log_softmax(logits, -1)
        errors, best, gaps = [], 0, []
        for step, top in enumerate(request["topLogprobs"]):
            ids = torch.tensor([i for i, _ in top], device=device)
            ours = torch.tensor([p for _, p in top], dtype=torch.float64, device=device)
            errors.append(((ours - reference[step, ids]).square().mean().sqrt() / spread[step]).item())
            gap = (reference[step].max() - reference[step, drawn[step]]).item() / spread[step].item()
            best += gap == 0
            gaps.append(gap)
        later = errors[1:] or [0.0]
        report.append({"request": request["name"], "prompt": len(prompt), "steps": len(errors), "prefill": errors[0],
                       "decode_mean": sum(later) / len(later), "decode_max": max(later), "argmax_equal": best,
                       "worst_gap": max(gaps)})
    summary = {"model": str(args.model), "reference": "Transformers float32, eager attention",
               "unit": "root mean square error of the best log probabilities over the standard deviation of the logits",
               "worst_prefill": max(r["prefill"] for r in report), "worst_decode": max(r["decode_max"] for r in report),
               "requests": report}
    text = json.dumps(summary, indent=1)
    if args.out:
        args.out.write_text(text)
    print(f"{args.model.name}: prefill {summary['worst_prefill']:.2e}, decode {summary['worst_decode']:.2e}, "
          f"argmax {sum(r['argmax_equal'] for r in report)} of {sum(r['steps'] for r in report)}, "
          f"worst gap {max(r['worst_gap'] for r in report):.2e}")


if __name__ == "__main__":
    main()
