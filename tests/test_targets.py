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


USUAL = ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "experts"]


def adapted(family, folder, stock):
    """An adapter of everything that is beside the experts too, saved by PEFT, and its logits there.

    Linears of shared experts and of dense layers, and routers, are targeted by their weights: PEFT of every release
    takes those for what they are. A router whose bias the layer reads by itself cannot be wrapped before transformers
    5.17: 'ParamWrapper' object has no attribute 'e_score_correction_bias'.
    """
    model = zoo.tiny_model(family).eval()
    biased = {name.rpartition(".")[0] for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias")}
    names = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and ".mlp." in name and "bias" not in name and name.rpartition(".")[0] not in biased
    }
    attention = sorted({n.split(".")[-2] for n, _ in model.named_parameters() if "self_attn" in n and "_proj" in n})
    lora = LoraConfig(r=zoo.R, lora_alpha=5, target_modules=attention, target_parameters=sorted(names))
    wrapped = stock(lambda: get_peft_model(model, lora)).eval()
    zoo.randomise(wrapped)
    wrapped.save_pretrained(folder)
    ids = zoo.token_ids()
    return wrapped, ids, stock(lambda: wrapped(ids).logits.detach())


def reconfigure(folder, **fields):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | fields))


def assert_arrives(family, folder, stock, wrapped, ids, logits):
    fresh = zoo.tiny_model(family).eval()
    base = {name: tensor for name, tensor in wrapped.get_base_model().state_dict().items() if ".lora_" not in name}
    fresh.load_state_dict({name.replace(".base_layer", ""): tensor for name, tensor in base.items()})
    loaded = assert_all_arrive(fresh, folder, stock).eval()
    torch.testing.assert_close(stock(lambda: loaded(ids).logits), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("through", [None, "per-expert"])
@pytest.mark.parametrize("foreign", ["as peft writes it", "the usual names", "all-linear", "nothing"])
@pytest.mark.parametrize("family", routed(zoo.FAMILIES))
def test_everything_arrives_whatever_the_config_said(tmp_path, stock, family, foreign, through):
    """Names that PEFT takes for the experts of transformers 4, names of no linear, a config of rank and alpha alone."""
    wrapped, ids, logits = adapted(family, tmp_path / "in", stock)
    config = wrapped.get_base_model().config.to_dict()
    given = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
    if foreign == "the usual names":
        modules = [*given["target_modules"], *USUAL, ROUTERS[family]]
        reconfigure(
            tmp_path / "in", target_modules=modules, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        )
    elif foreign == "all-linear":
        reconfigure(tmp_path / "in", target_modules="all-linear", target_parameters=None, lora_dropout=0.1)
    elif foreign == "nothing":
        (tmp_path / "in" / "adapter_config.json").write_text(json.dumps({"r": zoo.R, "lora_alpha": 5}))
    source = tmp_path / "in"
    if through:
        source = convert_adapter(source, tmp_path / "between", to=through, model=config).out
    convert_adapter(source, tmp_path / "out", to="peft", model=config)
    assert_arrives(family, tmp_path / "out", stock, wrapped, ids, logits)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert not {"experts", ROUTERS[family]} & {*written["target_modules"]}
    assert written.get("lora_dropout", 0) == 0
