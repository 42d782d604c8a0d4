"""Fields of a config by which factors mean something else: known of the installed PEFT, and refused where unread."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from support.adapter_files import PREFIX, Spec, load, read_config, save, save_per_expert

from peft_moe_compat.adapters.config_fields import CHANGES, READ, SAYS_NOTHING, unread
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.merge import merge_adapter
from peft_moe_compat.adapters.verify_merge import verify_merge
from peft_moe_compat.errors import AdapterError

SPEC = Spec()
VALUES = {"alora_invocation_tokens": [9, 10], "layer_replication": [[0, 1], [0, 1]], "use_qalora": True}
SERVERS = ("vllm", "vllm==0.28", "sglang", "llama.cpp")
Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"


def test_every_field_of_the_installed_peft_is_known():
    tables = (set(CHANGES), READ, SAYS_NOTHING)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_a_plain_config_of_the_installed_peft_has_nothing_unread():
    assert [*unread(peft.LoraConfig(target_modules=["q_proj"]).to_dict())] == []
    assert [*unread({"peft_version": "0.21.2", "my_own_notes": True})] == []
    newer = {"peft_version": "9.0.0", "use_newer": True, "group": 4, "r": 8}
    assert [name for name, _ in unread(newer)] == ["use_newer"]


def linears(folder, extra=(), **config):
    """An adapter of attention alone."""
    tensors = {f"{Q_PROJ}.lora_A.weight": torch.ones(2, 8), f"{Q_PROJ}.lora_B.weight": torch.ones(8, 2), **dict(extra)}
    return save(folder, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config})


def base(folder):
    """A checkpoint of that one linear."""
    name = f"{Q_PROJ.removeprefix(PREFIX)}.weight"
    save(folder, {name: torch.zeros(8, 8)}, {}).joinpath("adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SPEC.model()))
    return folder


@pytest.mark.parametrize("field", CHANGES)
def test_what_means_something_else_is_neither_merged_nor_written_for_servers(tmp_path, field):
    values = {field: VALUES.get(field, {"r": 2})}
    source = linears(tmp_path / "linears", **values)
    merge_adapter(base(tmp_path / "base"), linears(tmp_path / "plain"), tmp_path / "merged")
    with pytest.raises(AdapterError, match=field):
        merge_adapter(tmp_path / "base", source, tmp_path / "out")
    with pytest.raises(AdapterError, match=field):
        verify_merge(tmp_path / "base", source, tmp_path / "merged")
    experts = save_per_expert(tmp_path / "experts", SPEC, SPEC.factors(SPEC.linear_roles()))
    save(tmp_path / "experts", load(experts), read_config(experts) | values)
    for to in SERVERS:
        if (to, field) != ("llama.cpp", "alora_invocation_tokens"):
            with pytest.raises(AdapterError, match=field):
                convert_adapter(experts, tmp_path / to, to=to, model=SPEC.model())
    if field != "layer_replication":  # on the linears beside them
        with pytest.raises(AdapterError, match=f"{field}, which PEFT takes on no parameter"):
            convert_adapter(experts, tmp_path / "fused", to="peft==0.19.1", model=SPEC.model())


BIAS, HEAD = {f"{Q_PROJ}.lora_B.bias": torch.ones(8)}, {f"{PREFIX}lm_head.weight": torch.ones(16, 8)}
MAGNITUDE = {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(8)}
CASES = {
    "plain": ((), {}, {"vLLM >= 0.33": "reads", "vLLM >= 0.28, < 0.29": "reads", "SGLang": "reads"}),
    "DoRA": (MAGNITUDE, {"use_dora": True}, {"vLLM >= 0.33": "fails", "SGLang": "fails", "llama.cpp": "fails"}),
    "biases": (BIAS, {"lora_bias": True}, {"vLLM >= 0.33": "fails", "SGLang": "unknown", "llama.cpp": "fails"}),
    "a head": (HEAD, {"modules_to_save": ["lm_head"]}, {"vLLM >= 0.33": "fails", "llama.cpp": "fails"}),
    "a head in the config alone": ((), {"modules_to_save": ["lm_head"]}, {"vLLM >= 0.33": "fails", "SGLang": "reads"}),
    "PiSSA": ((), {"init_lora_weights": "pissa"}, {"vLLM >= 0.33": "fails", "SGLang": "wrong", "llama.cpp": "wrong"}),
    "aLoRA": ((), {"alora_invocation_tokens": [9]}, {"vLLM >= 0.33": "fails", "SGLang": "wrong", "llama.cpp": "reads"}),
    "repeated": ((), {"layer_replication": [[0, 1]]}, {"vLLM >= 0.28, < 0.29": "wrong", "SGLang": "wrong"}),
}


@pytest.mark.parametrize("case", CASES)
def test_files_without_lora_on_experts_are_judged_by_the_same_rules(tmp_path, case):
    extra, config, expected = CASES[case]
    found = inspect_adapter(linears(tmp_path / "in", extra, **config), model=SPEC.model()).readers
    assert {name: found[name].verdict for name in expected} == expected
    assert {verdict.verdict for name, verdict in found.items() if name.startswith("PEFT")} == {"reads"}


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_single_experts_whose_base_has_changed_do_not_become_fused(tmp_path, start):
    source = save_per_expert(tmp_path / "in", SPEC, SPEC.factors(SPEC.linear_roles()), init_lora_weights=start)
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        convert_adapter(source, tmp_path / "out", to="peft==0.19.0", model=SPEC.model())


@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal", "mica"])
def test_a_beginning_that_parameters_do_not_have_is_left_out(tmp_path, start):
    source = save_per_expert(tmp_path / "in", SPEC, SPEC.factors(SPEC.linear_roles()), init_lora_weights=start)
    convert_adapter(source, tmp_path / "out", to="peft==0.19.0", model=SPEC.model())
    assert read_config(tmp_path / "out")["init_lora_weights"] is True


def test_a_beginning_without_a_name_stays_as_it_is(tmp_path):
    source = save_per_expert(tmp_path / "in", SPEC, SPEC.factors(SPEC.linear_roles()), init_lora_weights=["gaussian"])
    convert_adapter(source, tmp_path / "out", to="peft==0.19.0", model=SPEC.model())
    assert read_config(tmp_path / "out")["init_lora_weights"] == ["gaussian"]
