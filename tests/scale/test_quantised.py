"""Quantised expert weights under LoRA: bitsandbytes, torchao, FP8 and MXFP4 as transformers builds them.

The oracles are stock PEFT on a plain model with the dequantised weights, and a float64 loop over them.
"""

from __future__ import annotations

import copy
import gc
import types
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import zoo
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, Mxfp4Config, TorchAoConfig
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import peft_moe_compat
from peft_moe_compat.errors import CompatWarning, NoExpertParametersError, PeftMoeCompatError

from .quantised_models import BLOCK, PROJECTIONS, QUANTISE, H, I, experts_at_the_bottom, experts_of, family_of, to_fp8

FLOAT32 = 2e-5
CASES = [(family_of(stored), stored) for stored in QUANTISE]
# FP8Experts takes no bias.
CASES += [("gpt_oss", stored) for stored in QUANTISE if not stored.startswith("fp8") and family_of(stored) != "gpt_oss"]


def tiny(family="qwen3_moe"):
    sizes = {"intermediate_size": I} if family == "gpt_oss" else {"moe_intermediate_size": I}
    return zoo.tiny_model(family, hidden_size=H, **sizes)


def dequantised(experts, name):
    """By the format's own means, without the library."""
    if isinstance(experts, finegrained_fp8.FP8Experts):
        convert = finegrained_fp8.Fp8Dequantize(None)._dequantize_one
        return convert(experts._parameters[name], experts._parameters[f"{name}_scale_inv"], torch.float32)
    weight = getattr(experts, name)
    return weight.detach().dequantize() if name in experts._parameters else weight.detach().clone()


def pair(family, stored, **lora):
    """A quantised model and a plain one of its dequantised weights, with the same LoRA on both."""
    plain = tiny(family)
    quantised = copy.deepcopy(plain)
    QUANTISE[stored](quantised)
    for experts, twin in zip(experts_of(quantised), experts_of(plain), strict=True):
        for name in PROJECTIONS:
            weight = dequantised(experts, name)
            change = (weight - twin._parameters[name]).abs().max()
            assert 0 < change < 0.2, "the weights were not quantised, or not to these values"
            twin._parameters[name].data.copy_(weight)
    quantised, plain = zoo.peft_model(quantised, **lora), zoo.peft_model(plain, **lora)
    share(quantised, plain)
    return quantised, plain


def share(source, target):
    """Copies every LoRA weight, by the parameter it is on: the nesting of the wrappers may differ."""
    theirs = {(w.get_base_layer() is e, i, w.parameter_name): w for i, e, w in wrappers_by_experts(target)}
    for i, experts, wrapper in wrappers_by_experts(source):
        twin = theirs[(wrapper.get_base_layer() is experts, i, wrapper.parameter_name)]
        for part in ("lora_A", "lora_B"):
            getattr(twin, part).load_state_dict(getattr(wrapper, part).state_dict())


def wrappers_by_experts(model):
    for i, experts in enumerate(experts_at_the_bottom(model)):
        for wrapper in zoo.wrappers(model):
            if wrapper.get_base_layer() is experts:
                yield i, experts, wrapper


def canonical(gradients, model):
    """The gradients with the names of LoRA tensors told by parameter, since the two nestings name them differently."""
    names = {}
    for i, _, wrapper in wrappers_by_experts(model):
        for part in ("lora_A", "lora_B"):
            for adapter, linear in getattr(wrapper, part).items():
                names[id(linear.weight)] = f"{i}.{wrapper.parameter_name}.{part}.{adapter}"
    renamed = {n: names.get(id(p), n) for n, p in model.named_parameters()}
    return {renamed.get(n, n): g for n, g in gradients.items()}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request):
    return *request.param, *pair(*request.param)


def test_report_names_the_format_and_the_fast_path(case):
    _, stored, quantised, _ = case
    report = peft_moe_compat.report(quantised)
    rows = [p for row in report.rows for p in row.parameters]
    assert [(p.name, p.format, p.path, p.reason) for p in rows] == [
        (name, stored, "grouped_mm", "") for _ in range(2) for name in PROJECTIONS
    ]
    assert all(len(p.shape) == 3 and {p.shape[1], p.shape[2]} <= {H, I, 2 * I} for p in rows)
    expected = f"{' x '.join(map(str, rows[0].shape))} {stored}"
    assert expected.replace(" ", "") in table_text(report)
    assert report.to_dict()["rows"][0]["parameters"][0]["format"] == stored


def table_text(report):
    """The table of a report without blanks, its cells joined over the lines they are folded into."""
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in str(report).splitlines() if "│" in line]
    return " ".join("".join(column) for column in zip(*cells, strict=True)).replace(" ", "")


def test_forward_and_gradients_equal_stock_peft_on_the_dequantised_weights(case, stock):
    _, _, quantised, plain = case
    ids = zoo.token_ids()
    theirs = canonical(stock(zoo.loss_and_gradients, plain, ids), plain)
    assert sum("lora_" in name for name in theirs) == 8
    for _ in range(3):  # nothing accumulates
        ours = canonical(zoo.loss_and_gradients(quantised, ids), quantised)
        zoo.assert_same(ours, theirs, FLOAT32)


def test_two_adapters_and_repeated_forwards_equal_a_float64_loop(case, stock):
    """The loop is the eager forward of the class in double, on weights with PEFT's own update."""
    _, _, quantised, plain = case
    for model in (quantised, plain):
        for wrapper in zoo.wrappers(model):
            zoo.add_adapter(wrapper, "second", r=2)
            wrapper._active_adapter = ["default", "second"]
    zoo.randomise(quantised)
    share(quantised, plain)
    ids = zoo.token_ids()
    exact = copy.deepcopy(plain).double()
    for experts in experts_at_the_bottom(exact):
        experts.config._experts_implementation = "eager"
    for parameter in exact.parameters():
        parameter.requires_grad_("lora_" in "".join(n for n, p in exact.named_parameters() if p is parameter))
    loop = canonical(stock(zoo.loss_and_gradients, exact, ids), exact)
    assert sum("lora_" in name for name in loop) == 16
    for _ in range(3):
        zoo.assert_same(canonical(zoo.loss_and_gradients(quantised, ids), quantised), loop, 1e-4)


def kept_for_backward(model, ids):
    """Sizes of the float tensors kept between forward and backward, saved by autograd or alive elsewhere."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    owned = {id(t) for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    sizes = [t.numel() for t in (*kept, *alive) if t.dtype in (torch.float32, torch.bfloat16) and id(t) not in owned]
    loss.backward()
    return sizes


@pytest.mark.parametrize("stored", QUANTISE)
def test_no_dequantised_stack_is_kept_for_the_backward(stored):
    model = tiny(family_of(stored))
    QUANTISE[stored](model)
    model = zoo.peft_model(model)
    for p in model.parameters():  # so that not one product is without a backward
        p.requires_grad_(p.requires_grad or (p.is_floating_point() and p.dtype.itemsize >= 2 and p.ndim < 3))
    experts = experts_at_the_bottom(model)[0]
    stacks = {experts.num_experts * H * n for n in (I, 2 * I)}
    gc.collect()
    sizes = kept_for_backward(model, zoo.token_ids(1, 7))
    assert sizes
    assert not stacks & set(sizes)


def test_the_measurement_sees_a_kept_stack(stock):
    """Autograd keeps the sum that stock PEFT makes of each stack and its update."""
    model = zoo.peft_model(tiny())
    experts = experts_at_the_bottom(model)[0]
    sizes = stock(kept_for_backward, model, zoo.token_ids(1, 7))
    assert {experts.num_experts * H * n for n in (I, 2 * I)} <= set(sizes)


def test_each_stack_is_dequantised_once_forward_and_once_backward():
    model = tiny()
    QUANTISE["bnb nf4"](model)
    model = zoo.peft_model(model)
    model.enable_input_require_grads()
    calls = []
    for i, experts in enumerate(experts_at_the_bottom(model)):
        for name in PROJECTIONS:
            experts.parametrizations[name][0].register_forward_hook(lambda *_, key=(i, name): calls.append(key))
    ids = zoo.token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    forward = [(i, name) for i in range(2) for name in PROJECTIONS]
    assert calls == forward
    loss.backward()
    assert calls == forward + forward[::-1]
    peft_moe_compat.report(model)
    peft_moe_compat.expert_parameters(model)
    assert len(calls) == 8, "naming a weight takes no dequantising"


@pytest.mark.parametrize("stored", ["bnb nf4", "torchao Int8Tensor", "fp8 (fine-grained)", "mxfp4"])
def test_bfloat16_is_bit_equal_to_plain_weights(stored):
    """So what is tested of plain weights in low precision holds for these."""
    plain = tiny(family_of(stored)).to(torch.bfloat16)
    quantised = copy.deepcopy(plain)
    QUANTISE[stored](quantised)
    if stored.startswith(("bnb", "mxfp4")):
        assert experts_of(quantised)[0].down_proj.dtype == torch.bfloat16
    quantised, plain = zoo.peft_model(quantised), zoo.peft_model(plain)
    share(quantised, plain)
    for experts, twin in zip(*map(experts_at_the_bottom, (quantised, plain)), strict=True):
        for name in PROJECTIONS:
            twin._parameters[name].data.copy_(dequantised(experts, name).to(torch.bfloat16))
    index, weights = zoo.routing(6, tokens=256)
    given = {"hidden_states": torch.randn(256, H).bfloat16(), "top_k_index": index, "top_k_weights": weights.bfloat16()}
    layers = [m.base_model.model.model.layers[0].mlp.experts for m in (quantised, plain)]
    ours, same = (canonical(zoo.gradients(layer, given, {}), layer) for layer in layers)
    assert ours.keys() == same.keys()
    assert len(ours) == 7
    for name, expected in same.items():
        assert torch.equal(ours[name], expected), name


def test_fp8_is_dequantised_to_the_dtype_of_autocast_where_that_is_on():
    quantised, plain = pair("qwen3_moe", "fp8 (fine-grained)")
    index, weights = zoo.routing(6)
    given = {"hidden_states": torch.randn(zoo.T, H), "top_k_index": index, "top_k_weights": weights}
    layers = [m.base_model.model.model.layers[0].mlp.experts for m in (quantised, plain)]
    in_float32 = zoo.gradients(layers[0], given, {})
    for name in PROJECTIONS:
        weight = layers[1].get_base_layer()._parameters[name]
        weight.data = weight.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, same = (zoo.gradients(layer, given, {}) for layer in layers)
    for name, expected in same.items():
        assert torch.equal(ours[name], expected), name
    assert not torch.equal(ours["output"], in_float32["output"])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("stored", ["bnb nf4", "torchao Int8Tensor", "fp8 (fine-grained)", "mxfp4"])
def test_activation_checkpointing_changes_nothing(stored, reentrant):
    quantised, _ = pair(family_of(stored), stored)
    quantised.enable_input_require_grads()
    ids = zoo.token_ids()
    before = zoo.loss_and_gradients(quantised, ids)
    quantised.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    zoo.assert_same(zoo.loss_and_gradients(quantised, ids), before, 1e-6)


@pytest.mark.parametrize("stored", ["torchao Int8Tensor", "fp8 (fine-grained)"])
def test_a_weight_that_is_offloaded_after_the_forward_is_kept_for_the_backward(stored):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    quantised, _ = pair("qwen3_moe", stored)
    ids = zoo.token_ids()
    before = zoo.loss_and_gradients(quantised, ids)
    for experts in experts_at_the_bottom(quantised):
        weights = {n: p.detach() for n, p in experts.named_parameters()}
        add_hook_to_module(experts, AlignDevicesHook("cpu", offload=True, weights_map=weights))
        assert experts.down_proj.is_meta
    zoo.assert_same(zoo.loss_and_gradients(quantised, ids), before, 1e-6)
    assert all(e.down_proj.is_meta for e in experts_at_the_bottom(quantised))
    for experts in experts_at_the_bottom(quantised):
        remove_hook_from_module(experts)


def offload_by_hooks(experts):
    """What accelerate would do if it found the 4-bit weight under the name it has."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for parametrized in experts.parametrizations.values():
        weights = {name: p.detach() for name, p in parametrized.named_parameters()}
        add_hook_to_module(parametrized, AlignDevicesHook("cpu", offload=True, weights_map=weights))


@pytest.mark.parametrize(
    ("family", "stored"), [case for case in CASES if case[1] in ("bnb nf4", "parametrised by Int8", "mxfp4")]
)
def test_training_over_offloaded_parametrised_weights(family, stored):
    from accelerate import cpu_offload

    quantised, _ = pair(family, stored)
    ids = zoo.token_ids()
    before = zoo.loss_and_gradients(quantised, ids)
    for experts in experts_at_the_bottom(quantised):
        if stored == "bnb nf4":
            offload_by_hooks(experts)
        else:
            cpu_offload(experts, execution_device="cpu")
        assert all(experts.parametrizations[name].original.is_meta for name in PROJECTIONS)
    for _ in range(2):
        zoo.assert_same(zoo.loss_and_gradients(quantised, ids), before, 1e-6)
    assert all(e.parametrizations.down_proj.original.is_meta for e in experts_at_the_bottom(quantised))


def test_upstream_accelerate_does_not_find_4bit_parametrised_weights():
    """bitsandbytes saves them under another name than they are held by, and accelerate offloads by the saved one."""
    from accelerate import cpu_offload

    model = tiny()
    QUANTISE["bnb nf4"](model)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(KeyError, match="parametrizations.*original"):
        model(zoo.token_ids())


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("stored", ["bnb nf4", "torchao Int8Tensor", "fp8 (fine-grained)", "mxfp4"])
def test_fullgraph_compile_keeps_no_dequantised_stack_either(stored, checkpointed):
    quantised, _ = pair(family_of(stored), stored)
    layer = quantised.base_model.model.model.layers[0].mlp.experts
    index, weights = zoo.routing(6)
    given = {"hidden_states": torch.randn(zoo.T, H), "top_k_index": index, "top_k_weights": weights}
    eager = zoo.gradients(layer, given, {})
    kept = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = layer

        def forward(self, *inputs):
            if checkpointed:
                return torch.utils.checkpoint.checkpoint(self.experts, *inputs, use_reentrant=False)
            return self.experts(*inputs)

    torch._dynamo.reset()
    compiled = torch.compile(Block(), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            ours = zoo.gradients(compiled, given, {})
        zoo.assert_same({n.removeprefix("_orig_mod.experts."): v for n, v in ours.items()}, eager, 1e-5)
    stacks = {6 * H * n for n in (I, 2 * I)}
    assert kept
    assert not [t.shape for t in kept if type(t) is torch.Tensor and t.dtype == torch.float32 and t.numel() in stacks]


# What PEFT itself does on these formats, as of 0.21.2. When one of these fails, upstream has mended it: tell
# `Format.caveat` in model/weights.py.


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization:UserWarning")
def test_upstream_loses_the_inner_lora_and_never_removes_its_update(stock):
    """PEFT 0.21.2 on a 4-bit base: the inner wrapper's LoRA gets no gradient, and a second training step fails."""
    quantised, _ = pair("qwen3_moe", "bnb nf4")
    ids = zoo.token_ids()
    right = zoo.loss_and_gradients(quantised, ids)["loss"]
    wrong = stock(zoo.loss_and_gradients, quantised, ids)
    assert (wrong["loss"] - right).abs() > 1e-3
    assert not any("base_layer.lora_" in name for name in wrong)
    with pytest.raises(RuntimeError, match="floating point dtype can require gradients"):
        stock(zoo.loss_and_gradients, quantised, ids)
    # The same model under this library: the update that was left behind would count twice.
    with pytest.raises(PeftMoeCompatError, match="left 1 _LoraFactorsProxy .* Load the model again"):
        zoo.loss_and_gradients(quantised, ids)


def test_upstream_accumulates_its_update_in_evaluation(stock):
    quantised, _ = pair("qwen3_moe", "bnb nf4")
    ids = zoo.token_ids()
    with torch.no_grad(), pytest.warns(UserWarning, match="Could not find any LoRA parametrization"):
        losses = [stock(quantised, input_ids=ids, labels=ids).loss for _ in range(3)]
    assert (losses[0] - losses[1]).abs() > 1e-3
    assert (losses[1] - losses[2]).abs() > 1e-3


def test_upstream_cannot_run_lora_on_torchao_int8_experts(stock):
    quantised, _ = pair("qwen3_moe", "torchao Int8Tensor")
    with pytest.raises(NotImplementedError, match="Int8Tensor"):
        stock(zoo.loss_and_gradients, quantised, zoo.token_ids())


def test_upstream_adds_its_update_to_fp8_values_before_their_scales(stock):
    """With the update of PEFT's own forward in place, the weight that the kernel is given is off by the scale."""
    quantised, _ = pair("qwen3_moe", "fp8 (fine-grained)")
    experts = experts_at_the_bottom(quantised)[0]
    wrapper = next(w for w in zoo.wrappers(quantised) if w.get_base_layer() is experts)
    name = wrapper.parameter_name
    expand = finegrained_fp8.Fp8Dequantize(None)._dequantize_one
    scale = experts._parameters[f"{name}_scale_inv"]
    with torch.no_grad():
        right = dequantised(experts, name) + wrapper.get_delta_weight("default")
        with wrapper._activate_lora(["default"]):
            given = expand(getattr(experts, name), scale, torch.float32)
    rounding = (dequantised(experts, name) * 2**-3).norm()
    assert (given - right).norm() > 3 * rounding


def test_upstream_reports_a_merge_into_a_4_bit_weight_that_changes_nothing(stock):
    quantised, _ = pair("qwen3_moe", "bnb nf4")
    experts = experts_at_the_bottom(quantised)[0]
    before = experts.down_proj.clone()
    stock(quantised.merge_adapter)
    assert torch.equal(experts.down_proj, before)
    assert peft_moe_compat.report(quantised).rows[0].parameters[0].reason == (
        "adapters are merged, but a merge into a quantised weight is lost; unmerge them"
    )


# Nesting, files


def test_wrappers_nest_as_on_a_plain_base():
    quantised, plain = pair("qwen3_moe", "bnb nf4")
    chains = [[w.parameter_name for w in zoo.wrappers(m)[:2]] for m in (quantised, plain)]
    assert chains == [["down_proj", "gate_up_proj"]] * 2


@pytest.mark.parametrize("onto", ["plain", "quantised"])
def test_an_adapter_moves_between_a_4_bit_and_a_plain_base(onto, tmp_path, stock):
    """Targets are endings, as PEFT wants them on a plain base; on the other it finds none of them by itself."""
    models = pair("qwen3_moe", "bnb nf4", target_parameters=[f"experts.{name}" for name in PROJECTIONS])
    source, target = models if onto == "plain" else models[::-1]
    ids = zoo.token_ids()
    expected = zoo.loss_and_gradients(source, ids)
    source.save_pretrained(tmp_path)
    bare = target.unload()
    refusal = pytest.raises(ValueError, match="no `target_parameters` found")
    with nullcontext() if onto == "plain" else refusal:
        by_itself = stock(PeftModel.from_pretrained, copy.deepcopy(bare), tmp_path, is_trainable=True)
        zoo.assert_same(stock(zoo.loss_and_gradients, by_itself, ids), expected, FLOAT32)
    moved = PeftModel.from_pretrained(bare, tmp_path, is_trainable=True)
    zoo.assert_same(zoo.loss_and_gradients(moved, ids), expected, FLOAT32)
    moved.load_adapter(tmp_path, "second")
    moved.set_adapter("second")
    assert (moved(ids).logits - expected["logits"]).abs().max() <= FLOAT32 * expected["logits"].abs().max()


def test_an_adapter_whose_wrappers_stock_peft_nested_otherwise_is_read_as_what_it_is(tmp_path, stock):
    """As files are that were saved from a 4-bit base without the library."""
    full_names = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in PROJECTIONS]
    quantised, plain = tiny(), tiny()
    QUANTISE["bnb nf4"](quantised)
    config = LoraConfig(r=3, target_modules=[], target_parameters=full_names)
    nested = stock(get_peft_model, quantised, config)
    assert [w.parameter_name for w in zoo.wrappers(nested)[:2]] == ["gate_up_proj", "down_proj"]
    zoo.randomise(nested)
    nested.save_pretrained(tmp_path)
    moved = PeftModel.from_pretrained(plain, tmp_path)
    path = "base_model.model.model.layers.0.mlp.experts"
    ours, theirs = (peft_moe_compat.expert_loras(m.get_submodule(path)) for m in (nested, moved))
    for name in PROJECTIONS:
        assert torch.equal(ours[name].A, theirs[name].A)
        assert torch.equal(ours[name].B, theirs[name].B)


@pytest.mark.parametrize("stored", QUANTISE)
def test_an_adapter_saved_from_a_quantised_base_loads_onto_it_again(stored, tmp_path):
    quantised, _ = pair(family_of(stored), stored)
    ids = zoo.token_ids()
    before = zoo.loss_and_gradients(quantised, ids)
    quantised.save_pretrained(tmp_path)
    bare = copy.deepcopy(quantised).unload()
    again = PeftModel.from_pretrained(bare, tmp_path, is_trainable=True)
    zoo.assert_same(zoo.loss_and_gradients(again, ids), before, 1e-6)


# As transformers loads them


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen3_moe")
    tiny().save_pretrained(folder)
    return folder


def loaded(folder, config):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).train()
    return zoo.peft_model(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_leaves_fused_experts_as_they_are_in_a_bitsandbytes_model(bits, checkpoint, stock):
    """BitsAndBytesConfig replaces linear layers only; the experts stay in the dtype of the model."""
    model = loaded(checkpoint, BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == (
        "Linear4bit" if bits == 4 else "Linear8bitLt"
    )
    parameters = [p for row in peft_moe_compat.report(model).rows for p in row.parameters]
    assert [(p.format, p.path) for p in parameters] == [("", "grouped_mm")] * 4
    ids = zoo.token_ids()
    tolerance = FLOAT32 if bits == 4 else 1e-3  # bitsandbytes rounds the activations of 8-bit layers to float16
    zoo.assert_same(zoo.loss_and_gradients(model, ids), stock(zoo.loss_and_gradients, model, ids), tolerance)


def test_torchao_config_of_transformers(checkpoint, stock):
    pattern = r"re:.*experts\.(gate_up_proj|down_proj)"
    model = loaded(checkpoint, TorchAoConfig(FqnToConfig({pattern: Int8WeightOnlyConfig()})))
    parameters = [p for row in peft_moe_compat.report(model).rows for p in row.parameters]
    assert [(p.format, p.path) for p in parameters] == [("torchao Int8Tensor", "grouped_mm")] * 4
    compare_with_plain(model, checkpoint, stock)


def compare_with_plain(model, folder, stock):
    """Against stock PEFT on a plain model with the dequantised weights of this one."""
    plain = loaded(folder, None)
    for experts, twin in zip(experts_at_the_bottom(model), experts_at_the_bottom(plain), strict=True):
        for name in PROJECTIONS:
            twin._parameters[name].data.copy_(dequantised(experts, name))
    share(model, plain)
    ids = zoo.token_ids()
    theirs = canonical(stock(zoo.loss_and_gradients, plain, ids), plain)
    zoo.assert_same(canonical(zoo.loss_and_gradients(model, ids), model), theirs, FLOAT32)


def test_fp8_checkpoint_dequantised_by_transformers(checkpoint, stock):
    model = loaded(checkpoint, FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True))
    assert peft_moe_compat.report(model).rows[0].parameters[0].format == ""
    compare_with_plain(model, checkpoint, stock)


@pytest.fixture(scope="module")
def mxfp4_checkpoint(tmp_path_factory):
    """A tiny gpt-oss with its experts as blocks of 32 four-bit values and their exponents."""
    import json

    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt_oss_mxfp4")
    model = tiny("gpt_oss").to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [k for k in tensors if k.endswith(PROJECTIONS)]:
        E, into, out = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (E, out, into // 32, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(121, 125, (E, out, into // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mxfp4_checkpoint_dequantised_by_transformers(mxfp4_checkpoint, stock):
    model = loaded(mxfp4_checkpoint, Mxfp4Config(dequantize=True)).float()
    assert experts_at_the_bottom(model)[0].down_proj.abs().max() > 0
    report = peft_moe_compat.report(model)
    assert {(p.format, p.path) for row in report.rows for p in row.parameters} == {("", "grouped_mm")}
    ids = zoo.token_ids()
    zoo.assert_same(zoo.loss_and_gradients(model, ids), stock(zoo.loss_and_gradients, model, ids), FLOAT32)


# Refused by name


def mxfp4_model():
    """gpt-oss with the experts class of MXFP4, its weights replaced by what is no parameter, as the loader does."""
    model = tiny("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
        for name in PROJECTIONS:
            del layer.mlp.experts._parameters[name]
            setattr(layer.mlp.experts, name, types.SimpleNamespace(shape=(6, H, I)))
    return model


def test_mxfp4_experts_are_refused_by_name():
    model = mxfp4_model()
    with pytest.raises(
        NoExpertParametersError, match=r"mxfp4 weights cannot be wrapped.*Mxfp4Config\(dequantize=True\)"
    ):
        peft_moe_compat.expert_parameters(model)
    report = peft_moe_compat.report(model)
    parameters = [p for row in report.rows for p in row.parameters]
    assert {(p.format, p.path, p.wrapped) for p in parameters} == {("mxfp4", "base", False)}
    assert all("Mxfp4Config(dequantize=True)" in p.reason for p in parameters)
    assert len(parameters) == 4
    # PEFT finds nothing to wrap there.
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"]))


def fp4_experts():
    """transformers' class with two values to a byte, on the meta device."""
    config = tiny().config
    decorated = finegrained_fp8.use_experts_implementation(
        experts_class=finegrained_fp8.FP8Experts, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    with torch.device("meta"):
        return decorated(config=config, block_size=BLOCK, expert_dtype="fp4")


def test_packed_fp4_experts_are_refused_by_name():
    wrapped = zoo.wrap(fp4_experts(), [f"experts.{name}" for name in PROJECTIONS])
    with pytest.warns(CompatWarning, match="meta device"):  # where the module was made
        row = peft_moe_compat.report(wrapped).rows[0].parameters[0]
    assert (row.format, row.path) == ("fp4 (fine-grained)", "peft")
    assert "PEFT sizes its LoRA by the packed axis" in row.reason


@pytest.mark.parametrize("implementation", ["eager", "deepgemm"])
def test_other_forwards_of_fp8_experts_are_named_with_what_is_wrong_with_peft_there(implementation):
    quantised, _ = pair("qwen3_moe", "fp8 (fine-grained)")
    for experts in experts_at_the_bottom(quantised):
        experts.config._experts_implementation = implementation
    row = peft_moe_compat.report(quantised).rows[0].parameters[0]
    assert row.path == "peft"
    assert repr(implementation) in row.reason
    assert "before their scales" in row.reason


def test_fp8_scales_of_another_block_size_are_refused_by_name():
    quantised, _ = pair("qwen3_moe", "fp8 (fine-grained)")
    experts_at_the_bottom(quantised)[0].block_size = (16, 16)
    row = peft_moe_compat.report(quantised).rows[0].parameters[0]
    assert row.path == "peft"
    assert "gate_up_proj_scale_inv is (6, 8, 2); (6, 16, 4) were expected of blocks of (16, 16)" in row.reason


def test_lora_held_in_float8_is_refused_by_name():
    model = tiny()
    to_fp8(model)
    targets = peft_moe_compat.expert_parameters(model)
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert zoo.wrappers(model)[0].lora_A["default"].weight.dtype == torch.float8_e4m3fn
    row = peft_moe_compat.report(model).rows[0].parameters[0]
    assert row.path == "peft"
    assert "the LoRA is held in 8 bits" in row.reason


@pytest.mark.parametrize("block", [None, (64, 8)])
def test_fp8_experts_smaller_than_a_block_have_a_scale_for_gate_and_one_for_up(block):
    """As transformers' class allocates them; against the dequantisation of its loader."""
    config = copy.copy(tiny().config)
    config.moe_intermediate_size = 16
    experts = finegrained_fp8.FP8Experts(config, block_size=block)
    for name in PROJECTIONS:
        with torch.no_grad():
            experts._parameters[name].copy_(torch.randn(experts._parameters[name].shape))
            experts._parameters[f"{name}_scale_inv"].uniform_(0.5, 2)
        scale = experts._parameters[f"{name}_scale_inv"]
        assert scale.shape[1] == (2 if name == "gate_up_proj" else -(-H // (block or (H, H))[0]))
        theirs = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(experts._parameters[name], scale)
        assert torch.equal(dequantised(experts, name), theirs)


@pytest.mark.parametrize(("rows", "columns", "block"), [(8, 12, (4, 4)), (10, 7, (4, 4)), (6, 6, None), (5, 4, (8, 8))])
def test_fp8_blocks_that_do_not_divide_the_weight(rows, columns, block):
    from peft_moe_compat.model.weights import _dequantised_fp8, _scale_shape

    weight = torch.randn(3, rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(_scale_shape(weight, block)) + 0.1
    expected = weight.double()
    for e in range(3):
        for i in range(rows):
            for j in range(columns):
                at = (0, 0) if block is None else (i // block[0], j // block[1])
                expected[e, i, j] *= scale[e][at].double()
    found = _dequantised_fp8(weight, scale, block, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert weight.dtype == torch.float8_e4m3fn
