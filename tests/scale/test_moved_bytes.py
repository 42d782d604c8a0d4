"""benchmarks/moved_bytes.py against what a step of a tiny model moves, counted."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from .ranks import run

SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip
TOKENS, R = 32, 4
PROJECTIONS = ["experts.gate_up_proj", "experts.down_proj"]


class Received(TorchDispatchMode):
    """(collective, dtype) -> bytes that it brings from other ranks; of tokens, with what stays."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            to, of = (tensor.numel() * tensor.itemsize for tensor in args[:2])
            self.found[name, args[0].dtype] += abs(to - of)
        elif name == "_c10d_functional::all_to_all_single":
            self.found[name, args[0].dtype] += args[0].numel() * args[0].itemsize
        return function(*args, **(kwargs or {}))


def _counted(layers, layout, checkpointing):
    from transformers.distributed import DistributedConfig

    config = transformers.AutoConfig.for_model("qwen3_moe", num_hidden_layers=layers, **SIZES)
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(
        None, config=config, state_dict={}, dtype=torch.bfloat16, experts_implementation="grouped_mm",
        distributed_config=DistributedConfig(**layout),
    )  # fmt: skip
    model = get_peft_model(model, LoraConfig(r=R, target_modules=[], target_parameters=PROJECTIONS)).train()
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            parameter.data.zero_()  # the same experts for every token: what is sent differs, its sum does not
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.randint(0, 128, (2, TOKENS // 2))
    with Received() as received:
        model(input_ids=ids, labels=ids).loss.backward()
    return received.found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", [{"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 4}])
def test_bytes_of_a_layer_are_those_of_a_run(layout, checkpointing):
    spec = importlib.util.spec_from_file_location(
        "moved_bytes", Path(__file__).parents[2] / "benchmarks" / "moved_bytes.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    dense = 2 * 64 * 64 + 2 * 64 * 32 + 2 * 16 + 2 * 64 + 8 * 64
    ep = layout.get("ep_size", 1)
    expected = script.moved(script.Model(64, 32, 8, 2, dense), 4, ep, TOKENS, R, checkpointing)
    fewer, more = (run(4, _counted, layers, layout, checkpointing) for layers in (2, 3))
    each = [{key: b[key] - a[key] for key in b} for a, b in zip(fewer, more, strict=True)]
    gathered, reduced, sent = (
        "c10d::_allgather_base_",
        "c10d::_reduce_scatter_base_",
        "_c10d_functional::all_to_all_single",
    )
    for found in each:
        assert found[gathered, torch.bfloat16] == expected.dense + expected.experts
        assert found[gathered, torch.float32] + found[reduced, torch.float32] == expected.lora
    rows = sum(found.get((sent, torch.bfloat16), 0) for found in each) / 4
    assert rows * (1 - 1 / ep) == expected.tokens
