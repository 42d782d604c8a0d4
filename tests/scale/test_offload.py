"""Weights that accelerate keeps on the CPU or on disk and loads for one forward, against the same model in memory.

The oracle is our own model that is not offloaded, which test_models.py holds against stock PEFT: stock PEFT cannot run
offloaded experts (`test_upstream_stock_peft_cannot_run_offloaded_experts`).
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from support import zoo

import peft_moe_compat

TOLERANCE = 1e-5
FAMILIES = ["qwen3_moe", "gpt_oss"]


def config_for(model):
    targets = peft_moe_compat.expert_parameters(model)
    return LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets)


def plain_model(family):
    """The base model, and the same with random LoRA on the experts and q_proj, both in memory."""
    base = zoo.tiny_model(family)
    wrapped = get_peft_model(copy.deepcopy(base), config_for(base))
    zoo.randomise(wrapped)
    return base, wrapped


def with_data(model, adapter):
    """PEFT made the adapter on the meta device, where the offloaded weights are: gives it memory and numbers."""
    for name, module in model.named_modules():
        if "lora_" in name and isinstance(module, torch.nn.Linear):
            module.to_empty(device="cpu")
    set_peft_model_state_dict(model, adapter)
    return model


def own_experts(model):
    return list({id(w.get_base_layer()): w.get_base_layer() for w in zoo.wrappers(model)}.values())


def dispatched_base(base, wrapped, folder):
    """`dispatch_model` with the wrapped base layers on disk and everything else, the adapter too, on the CPU."""
    model = copy.deepcopy(wrapped)
    devices = {
        name: "disk" if name.endswith("base_layer") and not hasattr(module, "lora_A") else "cpu"
        for name, module in model.named_modules()
        if module._parameters or module._buffers
    }
    return dispatch_model(model, devices, main_device="cpu", offload_dir=folder)


def hooked_experts(base, wrapped, folder):
    """A hook on the experts modules alone."""
    model = copy.deepcopy(wrapped)
    for experts in own_experts(model):
        add_hook_to_module(experts, AlignDevicesHook("cpu", offload=True))
    return model


def wrapped_after(base, wrapped, offload):
    """`get_peft_model` on an offloaded model."""
    adapter = get_peft_model_state_dict(wrapped)
    model = get_peft_model(offload(base), config_for(base))
    return with_data(model, adapter)


def cpu_offloaded_base(base, wrapped, folder):
    return wrapped_after(base, wrapped, lambda m: cpu_offload(copy.deepcopy(m), execution_device="cpu"))


def disk_offloaded_base(base, wrapped, folder):
    return wrapped_after(base, wrapped, lambda m: disk_offload(copy.deepcopy(m), folder, execution_device="cpu"))


def from_pretrained(base, folder):
    """Loaded with the second decoder layer on disk."""
    base.save_pretrained(folder / "base")
    devices = {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    devices |= {f"model.{name}": "cpu" for name in ("embed_tokens", "rotary_emb", "norm")}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=devices, offload_folder=folder / "offload"
    ).train()


def loaded_base(base, wrapped, folder):
    return wrapped_after(base, wrapped, lambda m: from_pretrained(m, folder))


WAYS = [dispatched_base, hooked_experts, cpu_offloaded_base, disk_offloaded_base, loaded_base]
each_way = pytest.mark.parametrize("offloaded", WAYS, ids=lambda way: way.__name__)
each_family = pytest.mark.parametrize("family", FAMILIES)


def devices_of_experts(model):
    return {parameter.device.type for experts in own_experts(model) for parameter in experts.parameters()}


@each_way
@each_family
def test_training_over_an_offloaded_base(family, offloaded, tmp_path):
    """Forward and all gradients of two steps; the weights are away again in between, and autograd's own copy stays."""
    base, wrapped = plain_model(family)
    model = offloaded(base, wrapped, tmp_path)
    assert "meta" in devices_of_experts(model)
    rows = peft_moe_compat.report(model).rows
    assert {p.path for row in rows for p in row.parameters} == {"grouped_mm"}
    assert {a.gradient for row in rows for p in row.parameters for a in p.adapters} == {"yes"}
    for _ in range(2):
        ids = zoo.token_ids()
        zoo.assert_same(zoo.loss_and_gradients(model, ids), zoo.loss_and_gradients(wrapped, ids), TOLERANCE)
        assert "meta" in devices_of_experts(model)
        for each in (model, wrapped):
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1).step()


@each_way
def test_activation_checkpointing_loads_the_weights_again(offloaded, tmp_path):
    base, wrapped = plain_model("qwen3_moe")
    model = offloaded(base, wrapped, tmp_path)
    loads = []
    experts = own_experts(model)[-1]
    load = experts._hf_hook.pre_forward
    experts._hf_hook.pre_forward = lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        ids = zoo.token_ids()
        zoo.assert_same(zoo.loss_and_gradients(model, ids), zoo.loss_and_gradients(wrapped, ids), TOLERANCE)
    assert len(loads) == 4  # once forward and once in the recomputation, of two steps


@each_way
def test_the_adapter_saved_over_an_offloaded_base_is_the_plain_one(offloaded, tmp_path):
    base, wrapped = plain_model("qwen3_moe")
    model = offloaded(base, wrapped, tmp_path)
    model(input_ids=zoo.token_ids())
    model.save_pretrained(tmp_path / "offloaded")
    wrapped.save_pretrained(tmp_path / "plain")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("offloaded", "plain"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def all_on_cpu(wrapped, folder):
    return cpu_offload(copy.deepcopy(wrapped), execution_device="cpu")


def all_on_disk(wrapped, folder):
    return disk_offload(copy.deepcopy(wrapped), folder, execution_device="cpu")


@pytest.mark.parametrize("offloaded", [all_on_cpu, all_on_disk], ids=lambda way: way.__name__)
@each_family
def test_an_offloaded_adapter_runs_but_does_not_train(family, offloaded, tmp_path):
    """The hooks of lora_A and lora_B do not run by themselves, as ParamWrapper reads their weights without a call."""
    _, wrapped = plain_model(family)
    model, ids = offloaded(wrapped, tmp_path), zoo.token_ids()
    lora = {p.device.type for n, p in model.named_parameters() if "lora_" in n}
    assert lora == {"meta"}
    for _ in range(2):
        torch.testing.assert_close(model(input_ids=ids).logits, wrapped(input_ids=ids).logits)
        assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"meta"}
    for ours, theirs in zip(zoo.wrappers(model), zoo.wrappers(wrapped), strict=True):
        found, expected = peft_moe_compat.expert_loras(ours), peft_moe_compat.expert_loras(theirs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n].A, expected[n].A) and torch.equal(found[n].B, expected[n].B) for n in found)
    with pytest.raises(peft_moe_compat.PeftMoeCompatError, match="offloaded by accelerate, which drops the gradient"):
        zoo.loss_and_gradients(model, ids)
    with pytest.warns(peft_moe_compat.CompatWarning, match="are on the meta device"):
        rows = peft_moe_compat.report(model).rows
    assert {a.gradient for row in rows for p in row.parameters for a in p.adapters} == {"no"}


def test_a_frozen_offloaded_adapter_passes_gradients_on(tmp_path):
    _, wrapped = plain_model("qwen3_moe")
    wrapped.requires_grad_(False)
    model, ids = all_on_disk(wrapped, tmp_path), zoo.token_ids()
    gradients = []
    for each in (model, wrapped):
        embeddings = wrapped.get_input_embeddings().weight[ids].detach().requires_grad_()
        each(inputs_embeds=embeddings).logits.square().sum().backward()
        gradients.append({"embeddings": embeddings.grad})
    zoo.assert_same(*gradients, TOLERANCE)
    peft_moe_compat.report(model)  # an offloaded adapter that is not to train is no complaint


def test_an_adapter_without_data_is_refused(tmp_path):
    """PEFT puts a new adapter on the device of its weight; on an offloaded model that is "meta"."""
    base, _ = plain_model("qwen3_moe")
    model = get_peft_model(disk_offload(base, tmp_path, execution_device="cpu"), config_for(base))
    with torch.no_grad():  # q_proj's, which stock PEFT would trip over first
        for module in model.modules():
            if hasattr(module, "lora_A") and not hasattr(module, "parameter_name"):
                module.lora_A["default"].to_empty(device="cpu").weight.zero_()
                module.lora_B["default"].to_empty(device="cpu").weight.zero_()
    with pytest.raises(peft_moe_compat.PeftMoeCompatError, match="is on the meta device and holds no numbers"):
        model(input_ids=zoo.token_ids())
    with pytest.warns(peft_moe_compat.CompatWarning, match="are on the meta device"):
        peft_moe_compat.report(model)


def hooked_layers(wrapped):
    """A hook on each decoder layer that loads all of it, the adapter included."""
    model = copy.deepcopy(wrapped)
    for layer in model.get_base_model().model.layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, place_submodules=True))
    return model


@pytest.mark.parametrize("active", [True, False], ids=["ours", "stock"])
def test_upstream_offloading_whole_layers_drops_the_gradients_of_their_adapters(active, stock):
    """accelerate loads new Parameters for each forward. The forward is right; `report` says what will not train."""
    _, wrapped = plain_model("qwen3_moe")
    model, ids = hooked_layers(wrapped), zoo.token_ids()
    expected = zoo.loss_and_gradients(wrapped, ids)
    found = zoo.loss_and_gradients(model, ids) if active else stock(zoo.loss_and_gradients, model, ids)
    assert not any("lora_" in name for name in found)
    zoo.assert_same(found, {name: expected[name] for name in ("loss", "logits")}, TOLERANCE)
    with pytest.warns(peft_moe_compat.CompatWarning, match="so they get no gradient"):
        peft_moe_compat.report(model)


@pytest.mark.parametrize("offloaded", [hooked_experts, dispatched_base], ids=lambda way: way.__name__)
def test_upstream_stock_peft_cannot_run_offloaded_experts(offloaded, stock, tmp_path):
    """Its parametrization hides the weight from accelerate's hook, which then does not load it."""
    model = offloaded(*plain_model("qwen3_moe"), tmp_path)
    with pytest.raises(RuntimeError, match="unsupported scalarType"):
        stock(model, input_ids=zoo.token_ids())


def test_upstream_from_pretrained_cannot_put_an_adapter_on_disk_offloaded_experts(stock, tmp_path):
    """PEFT looks the experts up under the names they have in the checkpoint."""
    base, wrapped = plain_model("qwen3_moe")
    wrapped.save_pretrained(tmp_path / "adapter")
    model = from_pretrained(base, tmp_path)
    with pytest.raises(KeyError, match=r"experts\.0\.down_proj"):
        stock(PeftModel.from_pretrained, model, tmp_path / "adapter", offload_folder=tmp_path / "again")


def test_upstream_an_offloaded_adapter_cannot_be_saved(stock, tmp_path):
    _, wrapped = plain_model("qwen3_moe")
    model = all_on_cpu(wrapped, tmp_path)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        stock(model.save_pretrained, tmp_path / "adapter")


def test_upstream_merging_into_disk_offloaded_experts_loses_the_update(stock, tmp_path):
    """PEFT loads the weight, adds to it, and lets the hook drop it: of a nested wrapper it writes nothing back."""
    base, ids = zoo.tiny_model("qwen3_moe"), zoo.token_ids()
    targets = peft_moe_compat.expert_parameters(base)
    alone = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=[], target_parameters=targets))
    zoo.randomise(alone)
    model = dispatched_base(base, alone, tmp_path)
    with torch.no_grad():
        before = stock(lambda: alone.eval()(input_ids=ids).logits)
        stock(model.eval().merge_adapter)
        merged, bare = stock(lambda: model(input_ids=ids).logits), base.eval()(input_ids=ids).logits
        alone.merge_adapter()
        torch.testing.assert_close(alone(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
    assert (merged - before).abs().max() > 0.1 * (before - bare).abs().max()
