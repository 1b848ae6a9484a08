#!/usr/bin/env python3
"""Writes a random checkpoint of a real model's size in Hugging Face form (torch, safetensors needed).

Weights are random, never zero, and scaled so that activations keep a sane size through all layers.
The tokenizer is tiny-internvl's byte tokenizer under the real vocabulary size.
  make_checkpoint.py SHAPE OUT [--layers N] [--quant none|awq] [--seed S]
SHAPE: qwen2.5-32b, qwen2.5-7b, internvl2.5-4b.
"""
import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-internvl"
GROUP = 128
SHARD_BYTES = 4 << 30
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of an AWQ word holds column ORDER[i] of its eight
TEXT = {
    "qwen2.5-32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                        num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "internvl2.5-4b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                           num_key_value_heads=2, vocab_size=151674, tie_word_embeddings=True),
}
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)


class Writer:
    """Collects tensors and writes a shard whenever they fill one."""

    def __init__(self, out, device, dtype, seed):
        self.out, self.device, self.dtype = out, device, dtype
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.pending, self.size, self.files = {}, 0, []
        self.weight_map, self.total = {}, 0

    def add(self, name, tensor):
        tensor = tensor.contiguous().cpu()
        self.pending[name] = tensor
        self.size += tensor.numel() * tensor.element_size()
        if self.size >= SHARD_BYTES:
            self.flush()

    def flush(self):
        if not self.pending:
            return
        name = f"model-{len(self.files) + 1:05d}.safetensors"
        save_file(self.pending, str(self.out / name), metadata={"format": "pt"})
        self.weight_map.update({key: name for key in self.pending})
        self.files.append(name)
        self.total += self.size
        self.pending, self.size = {}, 0

    def normal(self, shape, std, mean=0.0):
        return (torch.randn(shape, generator=self.generator, device=self.device) * std + mean).to(self.dtype)

    def words(self, shape):
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=self.generator, device=self.device, dtype=torch.int32)


def linear(w, name, n, k, quant, bias, gain=0.7):
    std = gain / k**0.5
    if quant == "awq":
        w.add(f"{name}.qweight", w.words((k, n // 8)))
        zeros = torch.randint(6, 10, (k // GROUP, n), generator=w.generator, device=w.device, dtype=torch.int32)
        packed = torch.zeros((k // GROUP, n // 8), dtype=torch.int32, device=w.device)
        for i, column in enumerate(ORDER):
            packed |= zeros[:, column::8] << (4 * i)
        w.add(f"{name}.qzeros", packed)
        # uniform 4-bit values have a standard deviation of 4.6
        spread = torch.rand((k // GROUP, n), generator=w.generator, device=w.device) * 0.5 + 0.75
        w.add(f"{name}.scales", (spread * std / 4.6).to(torch.float16))
    else:
        w.add(f"{name}.weight", w.normal((n, k), std))
    if bias:
        w.add(f"{name}.bias", w.normal((n,), 0.02))


def decoder(w, shape, prefix, head, quant):
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    dim = hidden // shape["num_attention_heads"]
    keys = shape["num_key_value_heads"] * dim
    w.add(f"{prefix}embed_tokens.weight", w.normal((shape["vocab_size"], hidden), 0.02 if shape["tie_word_embeddings"] else 0.5))
    for i in range(shape["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}"
        w.add(f"{layer}.input_layernorm.weight", w.normal((hidden,), 0.05, 1.0))
        w.add(f"{layer}.post_attention_layernorm.weight", w.normal((hidden,), 0.05, 1.0))
        linear(w, f"{layer}.self_attn.q_proj", hidden, hidden, quant, True)
        linear(w, f"{layer}.self_attn.k_proj", keys, hidden, quant, True)
        linear(w, f"{layer}.self_attn.v_proj", keys, hidden, quant, True)
        linear(w, f"{layer}.self_attn.o_proj", hidden, hidden, quant, False)
        linear(w, f"{layer}.mlp.gate_proj", inner, hidden, quant, False)
        linear(w, f"{layer}.mlp.up_proj", inner, hidden, quant, False)
        linear(w, f"{layer}.mlp.down_proj", hidden, inner, quant, False)
    w.add(f"{prefix}norm.weight", w.normal((hidden,), 0.05, 1.0))
    if not shape["tie_word_embeddings"]:
        w.add(f"{head}.weight", w.normal((shape["vocab_size"], hidden), 2.0 / hidden**0.5))


def vision(w, shape, hidden, tower, projector):
    channels, inner = shape["hidden_size"], shape["intermediate_size"]
    w.add(f"{tower}embeddings.cls_token", w.normal((1, 1, channels), 0.5))
    w.add(f"{tower}embeddings.position_embeddings", w.normal((1, 1025, channels), 0.5))
    w.add(f"{tower}embeddings.patch_embeddings.projection.weight", w.normal((channels, 3, 14, 14), 1 / 588**0.5))
    w.add(f"{tower}embeddings.patch_embeddings.projection.bias", w.normal((channels,), 0.02))
    for i in range(shape["num_hidden_layers"]):
        layer = f"{tower}encoder.layer.{i}"
        for norm in ("layernorm_before", "layernorm_after"):
            w.add(f"{layer}.{norm}.weight", w.normal((channels,), 0.05, 1.0))
            w.add(f"{layer}.{norm}.bias", w.normal((channels,), 0.05))
        for part in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            linear(w, f"{layer}.attention.{part}", channels, channels, "none", True)
        linear(w, f"{layer}.mlp.fc1", inner, channels, "none", True)
        linear(w, f"{layer}.mlp.fc2", channels, inner, "none", True)
        w.add(f"{layer}.lambda_1", w.normal((channels,), 0.05, 0.5))
        w.add(f"{layer}.lambda_2", w.normal((channels,), 0.05, 0.5))
    w.add(f"{projector}layer_norm.weight", w.normal((4 * channels,), 0.05, 1.0))
    w.add(f"{projector}layer_norm.bias", w.normal((4 * channels,), 0.05))
    linear(w, f"{projector}linear_1", hidden, 4 * channels, "none", True)
    linear(w, f"{projector}linear_2", hidden, hidden, "none", True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(TEXT))
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers to keep (vision: as many at most)")
    parser.add_argument("--quant", choices=["none", "awq"], default="none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--positions", type=int, default=32768)
    args = parser.parse_args()
    begin = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    is_vlm = args.shape.startswith("internvl")
    # Published AWQ checkpoints are f16 throughout; dense ones and InternVL's are bf16.
    dtype = torch.float16 if args.quant == "awq" and not is_vlm else torch.bfloat16
    name = "float16" if dtype == torch.float16 else "bfloat16"
    text = dict(TEXT[args.shape])
    tower = dict(VISION)
    if args.layers:
        text["num_hidden_layers"] = args.layers
        tower["num_hidden_layers"] = min(args.layers, tower["num_hidden_layers"])
    w = Writer(args.out, "cuda" if torch.cuda.is_available() else "cpu", dtype, args.seed)
    common = dict(hidden_act="silu", max_position_embeddings=args.positions, rms_norm_eps=1e-6, rope_theta=1000000.0,
                  use_sliding_window=False, bos_token_id=256, eos_token_id=258, torch_dtype=name)
    if is_vlm:
        config = json.loads((TINY / "config.json").read_text())
        config.pop("quantization_config", None)
        config["torch_dtype"] = config["dtype"] = name
        config["image_seq_length"] = 256
        config["text_config"] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **common, **text}
        config["vision_config"].update(tower, image_size=[448, 448], torch_dtype=name, dtype=name)
        config["tie_word_embeddings"] = text["tie_word_embeddings"]
        decoder(w, text, "model.language_model.", "lm_head", args.quant)
        vision(w, tower, text["hidden_size"], "model.vision_tower.", "model.multi_modal_projector.")
    else:
        config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **common, **text}
        decoder(w, text, "model.", "lm_head", args.quant)
    if args.quant == "awq":
        config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
                                         "version": "gemm", "modules_to_not_convert": ["vision_tower", "multi_modal_projector"]}
    w.flush()
    index = {"metadata": {"total_size": w.total}, "weight_map": w.weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                 "special_tokens_map.json", "added_tokens.json", *(["processor_config.json"] if is_vlm else [])):
        shutil.copy(TINY / file, args.out / file)
    if is_vlm:
        settings = json.loads((TINY / "preprocessor_config.json").read_text())
        settings["size"] = {"height": 448, "width": 448}
        (args.out / "preprocessor_config.json").write_text(json.dumps(settings))
    print(f"{args.out}: {w.total / 1e9:.2f} GB in {len(w.files)} file(s), {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main()
