"""Adapters converted for a model that calls its modules otherwise."""

from __future__ import annotations

import pytest
import torch
from support.adapter_files import (
    PREFIX,
    QWEN,
    Spec,
    assert_identical,
    assert_updates,
    load,
    read_adapter,
    read_config,
    save,
    save_fused,
    save_per_expert,
)

from peft_moe_compat import convert_adapter, verify_adapters
from peft_moe_compat.errors import AdapterError

NEW = "peft==0.21.2,transformers==5.24.0"
SPEC = Spec(attention=True, ranks={"gate_up": 3, "gate": 3}, alphas={"down": 7})
BY_PEFT = {"peft_version": "0.21.2"}
DEEPER = "model.layers=model.language_model.layers"
BACK = "model.language_model.layers=model.layers"
PATTERNS = {
    "short": {"experts.gate_up_proj": 3},
    "full": {f"model.layers.{i}.mlp.experts.gate_up_proj": 3 for i in (0, 1)},
    "escaped": {rf"model\.layers\.{i}\.mlp\.experts\.gate_up_proj": 3 for i in (0, 1)},
    "expression": {r"model.layers.[01].mlp.experts.gate_up_proj": 3},
}


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("renames", [[DEEPER], {"model.layers": "model.language_model.layers"}])
def test_there_and_back_is_the_same_file(tmp_path, patterns, renames):
    factors = SPEC.factors(("gate_up", "down"))
    head = {f"{PREFIX}lm_head.weight": torch.ones(2)}
    config = BY_PEFT | {
        "rank_pattern": PATTERNS[patterns],
        "target_modules": ["model.layers.0.self_attn.q_proj", "q_proj"],
    }
    source = save_fused(tmp_path / "in", SPEC, factors, extra=head, **config)
    convert_adapter(source, tmp_path / "out", to=NEW, model=SPEC.model(), rename=renames)
    tensors = load(tmp_path / "out")
    assert {name.replace("language_model.", "") for name in tensors} == set(load(source))
    assert all(name.startswith(f"{PREFIX}model.language_model.layers.") for name in tensors if ".layers." in name)
    found = read_adapter(tmp_path / "out", QWEN, 4, orientation="linear", nesting=QWEN.parameters)
    assert_updates(found.experts, SPEC.updates(factors))
    assert read_config(tmp_path / "out")["target_modules"][0] == "model.language_model.layers.0.self_attn.q_proj"
    assert verify_adapters(source, tmp_path / "out", model=SPEC.model()).same
    convert_adapter(tmp_path / "out", tmp_path / "back", to=NEW, model=SPEC.model(), rename=[BACK])
    assert_identical(load(tmp_path / "back"), load(source))
    assert read_config(tmp_path / "back")["rank_pattern"] == PATTERNS[patterns]


def test_several_parts_are_renamed(tmp_path):
    spec = Spec(attention=True)
    factors = spec.factors(("gate", "up", "down"))
    source = save_per_expert(tmp_path / "in", spec, factors)
    more = ["mlp=feed_forward", "self_attn=attn"]
    convert_adapter(source, tmp_path / "out", to="per-expert", model=spec.model(), rename=more)
    paths = {".".join(name.split(".")[5:6]) for name in load(tmp_path / "out")}
    assert paths == {"feed_forward", "attn"}
    assert_updates(read_adapter(tmp_path / "out", QWEN, 4).experts, spec.updates(factors))


def test_a_new_path_may_look_like_pefts_prefix(tmp_path):
    spec = Spec(attention=True)
    source = save_per_expert(tmp_path / "in", spec, spec.factors(("gate", "up", "down")))
    bare = {f"base_model.trunk.{name.removeprefix(PREFIX)}": tensor for name, tensor in load(source).items()}
    source = save(tmp_path / "bare", bare, read_config(source))
    convert_adapter(source, tmp_path / "out", to="per-expert", model=spec.model(), rename=["trunk=model"])
    assert all(name.startswith(f"{PREFIX}{PREFIX}model.layers.") for name in load(tmp_path / "out"))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (["model.blocks=model.layers"], "no tensor of"),
        (["model.layers"], "parts of module paths were expected"),
        (["=model"], "parts of module paths were expected"),
        ([r"model\.layers=x"], "parts of module paths were expected"),
        (["layers.1=layers.0"], "one name"),
    ],
)
def test_a_rename_that_cannot_be_meant_is_refused(tmp_path, rename, message):
    source = save_fused(tmp_path / "in", SPEC, SPEC.factors(("gate_up", "down")), **BY_PEFT)
    with pytest.raises(AdapterError, match=message):
        convert_adapter(source, tmp_path / "out", to=NEW, model=SPEC.model(), rename=rename)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "rename", "message"),
    [
        ("fused", "layers.1.mlp.experts=layers.1.mlp.gate_proj", "makes LoRA of a linear .*which is LoRA of experts"),
        ("per_expert", "layers.1.mlp.experts=layers.1.mlp.gate_proj", "makes LoRA of a linear .*LoRA of experts"),
        ("per_expert", "experts.3=shared_experts", "makes LoRA of a linear .*LoRA of experts"),
        ("per_expert", "self_attn.q_proj=mlp.experts.7.up_proj", "makes LoRA of experts .*LoRA of a linear"),
        ("fused", "q_proj.lora_A=q_proj.A", "makes no LoRA .*LoRA of a linear"),
    ],
)
def test_a_rename_that_makes_something_else_of_lora_is_refused(tmp_path, form, rename, message):
    spec = Spec(attention=True)
    made, roles = (save_fused, ("down",)) if form == "fused" else (save_per_expert, spec.linear_roles())
    source = made(tmp_path / "in", spec, spec.factors(roles), **BY_PEFT)
    with pytest.raises(AdapterError, match=message):
        convert_adapter(source, tmp_path / "out", to="per-expert", model=spec.model(), rename=[rename])
    assert not (tmp_path / "out").exists()


def test_an_expression_that_means_the_old_paths_is_refused(tmp_path):
    config = BY_PEFT | {"rank_pattern": {r"model.(layers|blocks).\d.mlp.experts.gate_up_proj": 3}}
    source = save_fused(tmp_path / "in", SPEC, SPEC.factors(("gate_up", "down")), **config)
    with pytest.raises(AdapterError, match="rank_pattern"):
        convert_adapter(source, tmp_path / "out", to=NEW, model=SPEC.model(), rename=[DEEPER])
