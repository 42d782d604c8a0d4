"""What a written config targets: PEFT of the installed pair puts every LoRA of the file where it belongs."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import zoo

from peft_moe_compat import convert_adapter, inspect_adapter, verify_adapters

# The routers that are bare parameters, PEFT's only way to which is their name.
ROUTERS = {"mixtral": "gate", "qwen3_moe": "gate", "deepseek_v3": "gate", "glm4_moe": "gate", "gpt_oss": "router"}


def routed(families):
    return [family for family in families if family in ROUTERS]


def arrived(model):
    """LoRA tensors of a live model, by their names in a file."""
    state = model.state_dict()
    return {name.replace(".default.weight", ".weight"): tensor for name, tensor in state.items() if ".lora_" in name}


def assert_all_arrive(model, folder, stock):
    """Stock PEFT loads every tensor of the folder, bit for bit, into a model of that class."""
    loaded = stock(lambda: PeftModel.from_pretrained(model, str(folder)))
    live, file = arrived(loaded), load_file(folder / "adapter_model.safetensors")
    assert live.keys() >= file.keys()
    assert all(torch.equal(live[name], tensor) for name, tensor in file.items())
    return loaded


@pytest.mark.parametrize("family", routed(zoo.FAMILIES))
def test_bare_names_beside_a_router_and_patterns(tmp_path, stock, family):
    """As PEFT 0.20 makes them of `target_modules="all-linear"`, and saves them."""
    model = zoo.tiny_model(family)
    r = zoo.R
    lora = LoraConfig(
        r=r,
        lora_alpha=5,
        target_modules=["q_proj", "kv_b_proj"],
        target_parameters=["gate_up_proj", f"{ROUTERS[family]}.weight", "down_proj"],
        rank_pattern={r".*\.gate_up_proj": 2 * r},
        alpha_pattern={r".*\.gate_up_proj": 10},
    )
    config = model.config.to_dict()
    wrapped = stock(lambda: get_peft_model(model, lora))
    zoo.randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "in")
    assert any(
        f".{ROUTERS[family]}.lora_A" in name for name in load_file(tmp_path / "in" / "adapter_model.safetensors")
    )
    found = inspect_adapter(tmp_path / "in", model=config)
    assert all({p.rank for p in module.projections} == {r, 2 * r} for module in found.modules)
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", model=config)
    same = verify_adapters(tmp_path / "in", tmp_path / "out", model=config)
    assert same.same
    assert_all_arrive(zoo.tiny_model(family), tmp_path / "out", stock)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert any(target.endswith(f"{ROUTERS[family]}.weight") for target in written["target_parameters"])
