"""`convert --to peft`: stock PEFT of the installed pair merges what is written for it into the right weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import PeftModel
from peft import __version__ as installed
from safetensors.torch import save_file
from support import zoo
from support.adapter_files import GPT_OSS, QWEN, Family, Spec, save_fused, save_per_expert, save_stacked

from peft_moe_compat import convert_adapter, inspect_adapter
from peft_moe_compat.layout import ExpertLora, to_flat
from peft_moe_compat.releases import release_for

E, H, I, R, ALPHA = 6, 32, 24, 2, 3
DEEPSEEK_V3 = Family("deepseek_v3", counts="n_routed_experts")  # with dense layers and shared experts
LINEARS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def write_fused(folder, orientation):
    """An adapter of two layers as PEFT lays it out; (layer, role) -> update "E out in"."""
    tensors, updates = {}, {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.mlp.experts"
        for slot, fan_in, fan_out in ((".base_layer", H, 2 * I), ("", I, H)):
            lora = ExpertLora(torch.randn(E, R, fan_in), torch.randn(E, fan_out, R), ALPHA / R)
            for letter, flat in zip("AB", to_flat(lora, orientation=orientation), strict=True):
                tensors[f"{stem}{slot}.lora_{letter}.weight"] = flat.contiguous()
            delta = lora.delta()
            if slot:
                updates[layer, "gate"], updates[layer, "up"] = delta.chunk(2, dim=1)
            else:
                updates[layer, "down"] = delta
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "peft_version": "0.21.2" if orientation == "linear" else "0.18.1",
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


def merged_updates(before, after):
    """(layer, role) -> what merging added to the experts' weights, "E out in", for experts fused or one by one."""
    found: dict = {}
    for name, weight in after.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer is None or "experts" not in name:
            continue
        change = weight - before[name]
        one = re.search(r"experts\.(\d+)\.(\w+)\.weight$", name)
        if one:
            found.setdefault((int(layer[1]), LINEARS[one[2]]), {})[int(one[1])] = change
        elif name.endswith("gate_up_proj"):
            found[int(layer[1]), "gate"], found[int(layer[1]), "up"] = change.chunk(2, dim=1)
        elif name.endswith("down_proj"):
            found[int(layer[1]), "down"] = change
    return {
        key: torch.stack([change[expert] for expert in range(E)]) if isinstance(change, dict) else change
        for key, change in found.items()
    }


@pytest.mark.parametrize("orientation", ["linear", "reversed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_stock_peft_merges_what_was_converted_for_it(tmp_path, stock, family, orientation):
    updates = write_fused(tmp_path / "in", orientation)
    model = zoo.tiny_model(family)
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", model=model.config.to_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = stock(lambda: PeftModel.from_pretrained(model, str(tmp_path / "out")).merge_and_unload())
    found = merged_updates(before, merged.state_dict())
    assert found.keys() == updates.keys()
    for key, update in updates.items():
        torch.testing.assert_close(found[key], update, rtol=1e-4, atol=1e-5)


def test_stock_peft_leaves_stacks_out_without_an_error(tmp_path, stock):
    model = zoo.tiny_model("qwen3_moe")
    config = model.config
    spec = Spec(E=config.num_experts, H=config.hidden_size, I=config.moe_intermediate_size, attention=True)
    targets = {"target_modules": ["q_proj", "gate_up_proj", "down_proj"]}
    folder = save_stacked(tmp_path, spec, spec.factors(("gate_up", "down")), **targets)
    found = inspect_adapter(folder, model=config.to_dict()).readers
    assert {verdict.verdict for reader, verdict in found.items() if reader.startswith("PEFT")} == {"wrong"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = stock(lambda: PeftModel.from_pretrained(model, str(folder)).merge_and_unload()).state_dict()
    changed = [name for name in before if not torch.equal(merged[name], before[name])]
    assert changed
    assert all("q_proj" in name for name in changed)


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "experts alone"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "per expert"])
@pytest.mark.parametrize("family", [QWEN, GPT_OSS, DEEPSEEK_V3], ids=lambda family: family.model_type)
def test_inspect_says_what_stock_peft_does_with_each_form(tmp_path, stock, family, fused, attention):
    model = zoo.tiny_model(family.model_type)
    config = model.config
    intermediate = getattr(config, family.intermediate)
    spec = Spec(family, E=getattr(config, family.counts), H=config.hidden_size, I=intermediate, attention=attention)
    save, roles = (save_fused, spec.fused_roles()) if fused else (save_per_expert, spec.linear_roles())
    transposed = family is GPT_OSS
    orientation = {"orientation": release_for(installed).orientation(transposed)} if fused else {}
    folder = save(tmp_path / "in", spec, spec.factors(roles), peft_version=installed, **orientation)
    found = inspect_adapter(folder, model=config.to_dict()).readers
    verdict = next(v for reader, v in found.items() if f">= {release_for(installed).since}" in reader)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        merged = stock(lambda: PeftModel.from_pretrained(model, str(folder)).merge_and_unload()).state_dict()
    except (ValueError, RuntimeError):
        assert verdict.verdict in ("fails", "wrong"), verdict  # "wrong" says that it may also not fail
        return
    moved = any("experts" in name for name in before if not torch.equal(merged[name], before[name]))
    assert verdict.verdict in (("reads", "unknown") if moved else ("wrong",)), verdict


def test_stock_peft_refuses_targets_that_reach_nothing(tmp_path, stock):
    write_fused(tmp_path / "in", "linear")
    model = zoo.tiny_model("qwen3_moe")
    out = convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", model=model.config.to_dict()).out
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": None, "target_modules": []}))
    found = inspect_adapter(out, model=model.config.to_dict()).readers
    since = str(release_for(installed).since)
    assert {v.verdict for reader, v in found.items() if f">= {since}" in reader} == {"fails"}
    with pytest.raises(ValueError, match="target_modules"):
        stock(lambda: PeftModel.from_pretrained(model, str(out)))
