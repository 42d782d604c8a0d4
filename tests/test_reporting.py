from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from peft import LoraConfig
from support import zoo
from torch import nn

import peft_moe_compat
from peft_moe_compat import CompatWarning, LayoutError, NoExpertParametersError, expert_parameters, report
from peft_moe_compat.model.experts import projections, routed_experts


def wrapped_parameters(model):
    return {(id(w.get_base_layer()), w.parameter_name) for w in zoo.wrappers(model)}


def test_the_zoo_is_what_the_installed_transformers_has():
    """What other tests are parametrised over: no family or class is left out of them unseen."""
    known = [family for family in zoo._FAMILIES if family in transformers.CONFIG_MAPPING]
    assert zoo.FAMILIES == (known if zoo.FUSED else ["gpt_oss"])
    assert (len(zoo.DECORATED) > 20) is zoo.FUSED
    assert "GptOssExperts" in [found.name for found in (zoo.DECORATED if zoo.FUSED else zoo.UNDECORATED)]
    assert len(zoo.UNDECORATED) > 2


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_peft_wraps_every_routed_expert_parameter_and_nothing_else(family):
    model = zoo.tiny_model(family)
    expected = {(id(module), n) for _, module, names in routed_experts(model) for n in names}
    assert expected
    assert all(p.ndim == 3 for _, m, names in routed_experts(model) for p in (getattr(m, n) for n in names))
    wrapped = zoo.peft_model(model)
    assert wrapped_parameters(wrapped) == expected
    others = [n for n, p in wrapped.named_parameters() if p.requires_grad and "experts" not in n]
    assert others == []


@pytest.mark.parametrize("found", zoo.CLASSES, ids=str)
def test_every_class_is_known_as_routed_or_left_out(found):
    """Every class with fused experts in the installed transformers is found; shared experts are not."""
    experts = zoo.build(found)
    inside = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    stacks = {n for n, p in experts.named_parameters() if p.ndim == 3}
    assert {n for _, _, names in routed_experts(inside) for n in names} == stacks != set()
    shared = nn.ModuleDict({"mlp": nn.ModuleDict({"shared_experts": experts})})
    assert list(routed_experts(shared)) == []


def test_targets_are_the_shortest_unambiguous_endings():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.is_transposed = False
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 3))
            self.down_proj = nn.Parameter(torch.zeros(2, 3, 2))

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(3, 2))

    def block(experts):
        return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})

    model = nn.ModuleDict({"layers": nn.ModuleList([block(Experts()), block(Dense()), block(Experts())])})
    assert expert_parameters(model) == [
        "experts.gate_up_proj",
        "layers.0.mlp.experts.down_proj",
        "layers.2.mlp.experts.down_proj",
    ]


def test_projections_and_layers_can_be_picked():
    model = zoo.tiny_model(zoo.FAMILIES[-1])
    assert expert_parameters(model, projections=["down_proj"]) == ["experts.down_proj"]
    last = expert_parameters(model, layers=[1])
    assert last == ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    for layer in (1, np.int64(1)):
        assert expert_parameters(model, projections="down_proj", layers=layer) == ["layers.1.mlp.experts.down_proj"]
    with pytest.raises(NoExpertParametersError, match=r"projections=\['down', 'down_proj'\].*have projections="):
        expert_parameters(model, projections=["down_proj", "down"])
    with pytest.raises(NoExpertParametersError, match=r"layers=\[1, 7\].*have layers=\[0, 1\]"):
        expert_parameters(model, layers=[1, 7])


def test_names_of_a_wrapped_model_are_those_of_the_bare_one():
    model = zoo.tiny_model(zoo.FAMILIES[0])
    before = expert_parameters(model)
    assert expert_parameters(zoo.peft_model(model)) == before


def small(config_class, **sizes):
    common = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config_class(**common | sizes))


def test_a_dense_model_has_none():
    with pytest.raises(NoExpertParametersError, match="LlamaForCausalLM has no routed expert.*no 3-D parameter at all"):
        expert_parameters(small(transformers.LlamaConfig, intermediate_size=32))


def test_separate_experts_are_told_apart_from_none():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(NoExpertParametersError, match=r"experts is a list of Linear.*target_modules"):
        expert_parameters(Block())


def test_unknown_stacks_are_listed_and_can_be_declared():
    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4, 5))

    model = nn.ModuleDict({"block": Gates()})
    with pytest.raises(NoExpertParametersError, match=r"block.weight \(3, 4, 5\).*declare_layout"):
        expert_parameters(model)
    peft_moe_compat.declare_layout(Gates, is_transposed=False)
    assert expert_parameters(model) == ["block.weight"]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_report_of_a_whole_model(family):
    model = zoo.tiny_model(family)
    bare = report(model)
    assert {p.path for row in bare.rows for p in row.parameters} == {"base"}
    wrapped = zoo.peft_model(model)
    full = report(wrapped)
    assert full.active
    assert full.warnings == ()
    fast = zoo.FUSED
    for row in full.rows:
        assert row.is_transposed is not None
        for parameter in row.parameters:
            assert parameter.wrapped
            assert parameter.path == ("grouped_mm" if fast else "peft")
            assert bool(parameter.reason) != (fast and parameter.backend != "loop")
            (adapter,) = parameter.adapters
            assert (adapter.name, adapter.rank, adapter.active, adapter.gradient) == ("default", zoo.R, True, "yes")
    assert json.loads(full.to_json())["rows"][0]["cls"] == full.rows[0].cls
    text = str(full)
    assert "default r=3" in text
    assert "\x1b" not in text
    peft_moe_compat.deactivate()
    reasons = {p.reason for row in report(wrapped).rows for p in row.parameters}
    assert reasons
    assert all("not active" in reason and "activate()" in reason for reason in reasons)


def test_layers_share_a_line():
    model = zoo.peft_model(zoo.tiny_model("gpt_oss", num_hidden_layers=4, layer_types=["full_attention"] * 4))
    assert "layers.{0-3}.mlp.experts" in "".join(str(report(model)).split())


def test_eager_and_replaced_forwards_are_reported_with_their_reason():
    found = (zoo.DECORATED if zoo.FUSED else zoo.CLASSES)[0]
    holder = zoo.wrap(zoo.build(found), [f"experts.{n}" for n in projections(zoo.build(found))])
    experts = zoo.wrappers(holder)[0].get_base_layer()
    experts.forward = lambda *a, **k: None
    (row,) = report(holder).rows
    assert {p.path for p in row.parameters} == {"peft"}
    del experts.forward
    if zoo.FUSED:
        experts.config._experts_implementation = "eager"
        (row,) = report(holder).rows
        assert "'eager'" in row.parameters[0].reason


def test_adapters_that_are_not_active_are_said():
    model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[-1]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    row = report(model).rows[0].parameters[0]
    assert (row.path, row.reason) == ("base", "none of its adapters is active")


def test_a_forward_that_was_hooked_before_the_activation_is_said():
    model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[-1]))
    hooked, later = zoo.wrappers(model)[:2]
    peft_moe_compat.deactivate()
    add_hook_to_module(hooked, ModelHook())
    peft_moe_compat.activate()
    add_hook_to_module(later, ModelHook())
    peft_moe_compat.deactivate()
    peft_moe_compat.activate()  # what was hooked in between holds a forward of an earlier activation
    rows = [row for layer in report(model).rows for row in layer.parameters]
    assert [row.path for row in rows if "hooked this wrapper before" in row.reason] == ["peft"]


def test_the_backend_of_offloaded_experts_is_that_of_the_device_they_run_on():
    model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[-1]))
    before = report(model).rows
    for i, experts in enumerate({wrapper.get_base_layer() for wrapper in zoo.wrappers(model)}):
        if i:
            add_hook_to_module(experts, AlignDevicesHook("cpu", offload=True))
        else:
            cpu_offload(experts, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in experts.parameters()} == {"meta"}
    assert report(model).rows == before


@pytest.mark.skipif(not zoo.FUSED, reason="transformers 4 keeps its experts one by one")
def test_weights_that_start_at_an_odd_address_are_named_as_such():
    model = zoo.peft_model(zoo.tiny_model("qwen3_moe").bfloat16())  # torch 2.9 takes no other
    weight = zoo.wrappers(model)[0].get_base_layer().gate_up_proj
    weight.data = weight.new_empty(weight.numel() + 1)[1:].view(weight.shape).copy_(weight.data)
    reasons = {p.name: str(p.reason) for p in report(model).rows[0].parameters if p.backend == "loop"}
    assert "multiple of 16 bytes" in reasons["gate_up_proj"]
    weight.data = weight.data.clone()
    assert {p.backend for p in report(model).rows[0].parameters} == {"torch"}


@pytest.mark.skipif(not zoo.FUSED, reason="transformers 4 keeps its experts one by one")
def test_the_backend_is_the_one_of_the_weights_dtype_and_sizes():
    model = zoo.peft_model(zoo.tiny_model("qwen3_moe", moe_intermediate_size=20).bfloat16())
    backends = {p.name: (p.backend, bool(p.reason)) for p in report(model).rows[0].parameters}
    assert backends == {"gate_up_proj": ("torch", False), "down_proj": ("loop", True)}
    assert {p.backend for p in report(model.double()).rows[0].parameters} == {"loop"}


def test_names_are_shown_as_they_are():
    model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[-1]), adapter_name="run[a]")
    assert "run[a]" in str(report(model))


def test_experts_behind_a_module_that_passes_attributes_on():
    model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[-1]))
    before, outermost = report(model).rows, zoo.wrappers(model)[0]
    path = next(name for name, module in model.named_modules() if module is outermost)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.compile(outermost, backend="eager"))
    assert [row.parameters for row in report(model).rows] == [row.parameters for row in before]
    with pytest.raises(LayoutError, match="but got a OptimizedModule"):
        peft_moe_compat.expert_loras(model.get_submodule(path))


def test_disabled_and_merged_are_said():
    model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[-1]))
    model.merge_adapter()
    assert "merged" in report(model).rows[0].parameters[0].reason
    model.unmerge_adapter()
    with model.disable_adapter():
        first = report(model).rows[0].parameters[0]
        assert "disabled" in first.reason
        assert not first.adapters[0].active


def test_it_warns_of_parameters_left_out():
    model = zoo.tiny_model(zoo.FAMILIES[-1])
    only = expert_parameters(model, projections=["down_proj"])
    wrapped = zoo.peft_model(model, target_parameters=only)
    with pytest.warns(CompatWarning, match="2 of 4 expert parameters are not adapted.*expert_parameters"):
        assert report(wrapped).warnings


def test_it_warns_of_adapters_that_pass_the_experts_by():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(zoo.tiny_model(zoo.FAMILIES[-1]), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(CompatWarning, match="4 of 4 expert parameters are not adapted"):
        report(model)


def test_stacks_nobody_declared_are_reported_once_wrapped():
    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4, 5))

    (row,) = report(zoo.wrap(Gates(), ["experts.weight"])).rows
    assert (row.cls, row.is_transposed, row.parameters[0].path) == ("Gates", None, "peft")
    assert "no routed experts" in str(report(nn.Linear(2, 2)))


def test_it_warns_of_an_adapter_on_some_parameters_only_and_of_lost_gradients():
    model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[-1]))
    chain = zoo.wrappers(model)
    zoo.add_adapter(chain[0], "second", r=2)
    with pytest.warns(CompatWarning, match="'second' is missing on 3 of 4"):
        report(model)
    chain[0].delete_adapter("second")
    chain[1].lora_B["default"].weight.requires_grad_(False)
    with pytest.warns(CompatWarning, match="'default' trains only in part.*1 expert parameters"):
        assert report(model).warnings
