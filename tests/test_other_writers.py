"""Every file of another writer, converted for the installed pair: stock PEFT merges it into the writer's updates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.written_files import base_of, matrices, stored_transposed

from peft_moe_compat import convert_adapter, inspect_adapter

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.parent.name for path in (FIXTURES / "handmade").glob("*/truth.json"))


def settled(folder, truth, model):
    """What a user who knows the file says of what is open; of `few_steps_grouped`, which misleads, in any case."""
    found = inspect_adapter(folder, model=model)
    names = {*found.undecided, *(("packing",) if folder.name == "few_steps_grouped" else ())}
    return {name: truth[name] for name in names}


@pytest.mark.parametrize("case", CASES)
def test_what_was_converted_is_merged_into_the_writers_updates(tmp_path, case, stock):
    folder = FIXTURES / "handmade" / case
    truth = json.loads((folder / "truth.json").read_text())
    made_from = FIXTURES / truth["made_from"]
    base = base_of(made_from)
    model = base.config.to_dict()
    out = convert_adapter(folder, tmp_path / "out", to="peft", model=model, **settled(folder, truth, model)).out
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    transposed = stored_transposed(base, made_from)
    merged = stock(lambda: PeftModel.from_pretrained(base, str(out)).merge_and_unload()).state_dict()
    changes = matrices(
        {name: merged[name] - tensor for name, tensor in before.items()}, truth["model_type"], transposed
    )
    wanted = matrices(load_file(folder / "truth.safetensors"), truth["model_type"], transposed=False)
    assert changes.keys() >= wanted.keys()
    for key, change in changes.items():
        update = wanted.get(key, torch.zeros_like(change))
        torch.testing.assert_close(change, update, rtol=1e-4, atol=1e-5, msg=str(key))


class Lists(torch.nn.Module):
    """The experts of gpt_oss as Unsloth holds them in 4 bit, here of ordinary linears."""

    def __init__(self, experts):
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            linears = []
            for weight in getattr(experts, name):
                linears.append(torch.nn.Linear(*weight.shape, bias=False))
                linears[-1].weight.data.copy_(weight.T)
            self.add_module(f"{name}s", torch.nn.ModuleList(linears))


def test_lists_of_linears_load_as_they_are_where_the_model_has_them():
    folder = FIXTURES / "handmade" / "unsloth_4bit_gpt_oss"
    truth = json.loads((folder / "truth.json").read_text())
    base = base_of(FIXTURES / truth["made_from"])
    for layer in base.model.layers:
        layer.mlp.experts = Lists(layer.mlp.experts)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload().state_dict()
    updates = load_file(folder / "truth.safetensors")
    for name, about in truth["parameters"].items():
        key = about["key"].removeprefix("base_model.model.") + ".weight"
        torch.testing.assert_close(merged[key] - before[key], updates[name], rtol=1e-4, atol=1e-5, msg=name)
