"""A tiny gpt-oss on disk as gpt-oss is published: experts in MXFP4, everything else in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import zoo

STACKS = ("gate_up_proj", "down_proj")
# Of openai/gpt-oss-20b and gpt-oss-120b.
CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def random_packed(num_experts: int, out_features: int, blocks: int, low: int = 121, high: int = 125):
    """blocks "E out in/32 16" and scales "E out in/32" of random numbers."""
    packed = torch.randint(0, 256, (num_experts, out_features, blocks, 16), dtype=torch.uint8)
    return packed, torch.randint(low, high, packed.shape[:-1], dtype=torch.uint8)


def publish(folder: Path, hidden_size: int = 64, intermediate_size: int = 96) -> Path:
    """Writes config.json and model.safetensors with random weights."""
    model = zoo.tiny_model("gpt_oss", hidden_size=hidden_size, intermediate_size=intermediate_size)
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(STACKS)]:
        E, in_features, out_features = tensors.pop(key).shape
        tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = random_packed(E, out_features, in_features // 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}), encoding="utf-8")
    return folder
