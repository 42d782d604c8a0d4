"""Tiny models that transformers shards while it loads them, with LoRA on experts and attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

import peft_moe_compat

E, R = 8, 3
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIG = {"r": R, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "target_parameters": TARGETS}
# Whole experts, and whole attention heads, on four ranks.
SIZES = {
    "qwen3_moe": {"num_experts": E, "num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": E, "num_key_value_heads": 4},
}
# Of float32 sums taken in another order, against the largest entry, over three steps.
TOLERANCE = 2e-5


def load(folder: str | Path, layout: Mapping[str, Any] | None = None) -> Any:
    """A saved model in training, sharded by a layout: the arguments of `DistributedConfig`."""
    options = {}
    if layout:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(**layout)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm", **options)
    return model.train()


@contextmanager
def stock() -> Iterator[None]:
    """With the library off."""
    peft_moe_compat.deactivate()
    try:
        yield
    finally:
        peft_moe_compat.activate()
