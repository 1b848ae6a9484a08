#!/usr/bin/env python3
"""Times Hugging Face Transformers on the same checkpoint as bench-gpu.mjs: first token and decode, as JSON.

  peer_transformers.py MODEL OUT.json [--batch 1,16] [--context 1024] [--new 64] [--repeats 3]
Greedy, bf16, SDPA attention, its own KV cache; random prompt ids of `context` tokens. Only the language model
of a vision-language checkpoint is timed. Steps are timed end to end, the sampler included, as ours are.
"""
import argparse
import json
import time

import torch
import transformers


def load(model):
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    vision = hasattr(config, "vision_config")
    kind = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    network = kind.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").to("cuda").eval()
    return network, (config.text_config if vision else config).vocab_size


@torch.inference_mode()
def run(network, ids, new_tokens):
    """Seconds to the first token, and of one step after it."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out = network(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(new_tokens - 1):
        out = network(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        token.cpu()  # a service looks at every token
    torch.cuda.synchronize()
    return first, (time.perf_counter() - begin) / (new_tokens - 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--context", default="1024")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    begin = time.perf_counter()
    network, vocab = load(args.model)
    report = {
        "model": args.model,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "loadSeconds": time.perf_counter() - begin,
        "runs": [],
    }
    for context in map(int, args.context.split(",")):
        for batch in map(int, args.batch.split(",")):
            ids = torch.randint(0, vocab - 1000, (batch, context), device="cuda")
            times = [run(network, ids, args.new) for _ in range(args.repeats)]
            step = sorted(step for _, step in times)[len(times) // 2]
            entry = {
                "context": context,
                "batch": batch,
                "stepMs": 1000 * step,
                "tokensPerSecond": batch / step,
                "firstTokenMs": [1000 * first for first, _ in times],
            }
            report["runs"].append(entry)
            print(json.dumps(entry), flush=True)
    with open(args.out, "w", encoding="utf8") as out:
        json.dump(report, out, indent=1)


main()
