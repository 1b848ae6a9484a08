"""Writes the model folders bf16/ and awq/ in Hugging Face layout."""
import json
import os
import shutil

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model import TEXT, VISION
from samples import SPECIALS

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'video' %}"
    "{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}"
    "{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{'<|im_end|>\\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{'<|im_start|>assistant\\n' }}"
    "{% endif %}")

EXTRA = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
         "video_token": "<video>"}


def config(tok):
    i = tok.token_to_id
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "downsample_ratio": 0.5,
        "image_seq_length": 64,
        "image_token_id": i("<IMG_CONTEXT>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "attention_dropout": 0.0,
            "bos_token_id": i("<|endoftext|>"),
            "eos_token_id": i("<|im_end|>"),
            "pad_token_id": i("<|endoftext|>"),
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": TEXT["hidden"],
            "initializer_range": 0.02,
            "intermediate_size": TEXT["mlp"],
            "max_position_embeddings": TEXT["positions"],
            "max_window_layers": TEXT["layers"],
            "num_attention_heads": TEXT["heads"],
            "num_hidden_layers": TEXT["layers"],
            "num_key_value_heads": TEXT["kv_heads"],
            "rms_norm_eps": TEXT["eps"],
            "rope_theta": TEXT["theta"],
            "rope_parameters": {"rope_theta": TEXT["theta"], "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": TEXT["vocab"],
        },
        "vision_config": {
            "architectures": ["InternVLVisionModel"],
            "model_type": "internvl_vision",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": VISION["hidden"],
            "image_size": [VISION["image"], VISION["image"]],
            "initializer_range": 0.02,
            "intermediate_size": VISION["mlp"],
            "layer_norm_eps": VISION["eps"],
            "layer_scale_init_value": 1.0,
            "norm_type": "layer_norm",
            "num_attention_heads": VISION["heads"],
            "num_channels": 3,
            "num_hidden_layers": VISION["layers"],
            "patch_size": [VISION["patch"], VISION["patch"]],
            "projection_dropout": 0.0,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
    }


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "backend": "autoawq",
              "do_fuse": False, "modules_to_not_convert": ["vision_tower", "multi_modal_projector", "embed_tokens", "lm_head"]}


def hub_name(k):
    """Checkpoint name as the published `-hf` InternVL checkpoints have it."""
    return k.replace("model.vision_tower.", "vision_tower.").replace("model.multi_modal_projector.", "multi_modal_projector.") \
        .replace("model.language_model.", "language_model.model.")


def dump(path, obj):
    with open(path, "w") as f:
        json.dump(obj, f, indent=2, ensure_ascii=False)
        f.write("\n")


def write_common(out, tokenizer_file):
    os.makedirs(out, exist_ok=True)
    tok = Tokenizer.from_file(tokenizer_file)
    i = tok.token_to_id
    shutil.copy(tokenizer_file, os.path.join(out, "tokenizer.json"))
    m = json.load(open(tokenizer_file))["model"]
    dump(os.path.join(out, "vocab.json"), m["vocab"])
    with open(os.path.join(out, "merges.txt"), "w") as f:
        f.write("#version: 0.2\n" + "".join((x if isinstance(x, str) else " ".join(x)) + "\n" for x in m["merges"]))
    added = {str(i(t)): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
             for t in SPECIALS}
    dump(os.path.join(out, "added_tokens.json"), {t: i(t) for t in SPECIALS})
    dump(os.path.join(out, "tokenizer_config.json"), dict({
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        "bos_token": None, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "extra_special_tokens": EXTRA, "model_max_length": 8192,
        "pad_token": "<|endoftext|>", "processor_class": "InternVLProcessor", "return_token_type_ids": False,
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}, **EXTRA))
    dump(os.path.join(out, "special_tokens_map.json"), dict({
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, **EXTRA))
    with open(os.path.join(out, "chat_template.jinja"), "w") as f:
        f.write(CHAT_TEMPLATE)
    dump(os.path.join(out, "preprocessor_config.json"), {
        "crop_size": None, "crop_to_patches": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "GotOcr2ImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225], "max_patches": 12, "min_patches": 1, "processor_class": "InternVLProcessor",
        "resample": 3, "rescale_factor": 1 / 255, "size": {"height": 224, "width": 224}})
    dump(os.path.join(out, "video_preprocessor_config.json"), {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225], "processor_class": "InternVLProcessor", "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224}, "video_processor_type": "InternVLVideoProcessor"})
    dump(os.path.join(out, "processor_config.json"), {"image_seq_length": 64, "processor_class": "InternVLProcessor"})
    dump(os.path.join(out, "generation_config.json"), {
        "do_sample": False, "eos_token_id": [i("<|im_end|>"), i("<|endoftext|>")], "pad_token_id": i("<|endoftext|>"),
        "max_new_tokens": 256})
    return config(tok)


def write_bf16(out, state, tokenizer_file):
    cfg = write_common(out, tokenizer_file)
    dump(os.path.join(out, "config.json"), cfg)
    save_file({hub_name(k): v.bfloat16().contiguous() for k, v in state.items()}, os.path.join(out, "model.safetensors"),
              metadata={"format": "pt"})


def write_awq(out, state, packed, tokenizer_file):
    """`state`: float state dict after the scales were folded; `packed`: the quantised tensors."""
    cfg = write_common(out, tokenizer_file)
    cfg["quantization_config"] = AWQ_CONFIG
    dump(os.path.join(out, "config.json"), cfg)
    t = {}
    for k, v in state.items():
        base, kind = k.rsplit(".", 1)
        if base + ".qweight" in packed:
            if kind == "bias":
                t[hub_name(k)] = v.half().contiguous()         # AutoAWQ keeps the bias of a quantised linear in fp16
            continue
        t[hub_name(k)] = v.bfloat16().contiguous()
    for k, v in packed.items():
        t[hub_name(k)] = v.cpu().contiguous()
    save_file(t, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
