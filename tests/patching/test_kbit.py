"""PEFT's `prepare_model_for_kbit_training`: frozen experts keep their dtype in it while the library is active."""

from __future__ import annotations

import inspect

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from support import zoo

import peft_moe_compat
from peft_moe_compat import CompatWarning

ATTENTION = ["q_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"]
HALF = [torch.bfloat16, torch.float16]


def half_model(family, implementation="grouped_mm", dtype=torch.bfloat16):
    model = zoo.tiny_model(family)
    model.config.dtype = dtype
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = implementation
    return model.to(dtype)


def with_packed_linears(model):
    """As far as a dtype tells: without any, a model that is float32 in whole is so on purpose."""
    model.register_parameter("packed", torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False))
    return model


def split(model):
    """(dtypes of what experts hold themselves, dtypes of all else)."""
    of_experts = {id(p) for n, m in model.named_modules() if n.endswith("experts") for p in m._parameters.values()}
    assert of_experts
    return tuple(
        {p.dtype for p in model.parameters() if (id(p) in of_experts) == wanted and p.is_floating_point()}
        for wanted in (True, False)
    )


@zoo.needs_registry
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_experts_stay_as_they_are_and_all_else_is_pefts(family, dtype):
    model = half_model(family, dtype=dtype)
    names = [name for name, _ in model.named_parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prepare_model_for_kbit_training(model) is model
    assert split(model) == ({dtype}, {torch.float32})
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor.float(), state[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_off_it_is_pefts_and_report_says_what_it_has_widened(family, stock):
    model = with_packed_linears(half_model(family))
    stock(prepare_model_for_kbit_training, model)
    assert split(model) == ({torch.float32}, {torch.float32})
    stacks = [p for row in row_of(model) for p in row.parameters]
    size = sum(p.numel() * 4 for n, p in model.named_parameters() if n.endswith(tuple(s.name for s in stacks)))
    with pytest.warns(
        CompatWarning, match=rf"{len(stacks)} frozen stacks of experts are float32 in a model of bf"
    ) as seen:
        peft_moe_compat.report(model)
    assert f"{size / 2**30:.2f} GiB" in str(seen[0].message)
    with pytest.warns(CompatWarning, match=r"narrow them: module\.to\(torch\.bfloat16\)"):
        peft_moe_compat.report(model)
    model.to(torch.bfloat16)
    peft_moe_compat.report(model)
    peft_moe_compat.report(half_model(family).float())


def row_of(model):
    with pytest.warns(CompatWarning):
        return peft_moe_compat.report(model).rows


@zoo.needs_registry
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("where", ["experts", "attention"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_model_trains_in_float32_around_them(family, where, implementation, stock):
    """With LoRA on the experts, and without any there: transformers' own functions want one dtype of both."""
    model = prepare_model_for_kbit_training(half_model(family, implementation))
    narrow = split(model)[0]
    wide = zoo.tiny_model(family)  # of the same values, and the same forward in float32 for all of it
    wide.load_state_dict(model.state_dict())
    targets = peft_moe_compat.expert_parameters(wide)
    ids, found = zoo.token_ids(), []
    for each in (model, wide):
        torch.manual_seed(3)
        lora = (
            {"target_parameters": targets, "target_modules": []}
            if where == "experts"
            else {"target_modules": ATTENTION}
        )
        wrapped = get_peft_model(each, LoraConfig(r=2, **lora))
        torch.manual_seed(4)
        zoo.randomise(wrapped)
        found.append(zoo.loss_and_gradients(wrapped, ids))
    ours, expected = found
    assert narrow == {torch.bfloat16}
    assert ours.keys() == expected.keys()
    assert len(ours) > 5
    # bfloat16 in the experts, float32 elsewhere: gradients of a tiny model are not nearer than that.
    of = [
        torch.cat([found[name].double().flatten() for name in expected if "lora_" in name])
        for found in (ours, expected)
    ]
    assert torch.cosine_similarity(*of, dim=0) > 0.97
    assert (ours["logits"] - expected["logits"]).norm() <= 0.05 * expected["logits"].norm()


@zoo.needs_registry
def test_what_another_forward_runs_is_left_to_peft():
    model = prepare_model_for_kbit_training(with_packed_linears(half_model("qwen3_moe", "eager")))
    assert split(model) == ({torch.float32}, {torch.float32})
    with pytest.warns(CompatWarning, match="float32 in a model of bfloat16"):
        peft_moe_compat.report(model)


def test_everybody_who_imported_it_holds_the_same_function_with_pefts_signature():
    held = {peft.prepare_model_for_kbit_training, peft.utils.prepare_model_for_kbit_training}
    assert held == {prepare_model_for_kbit_training, peft.utils.other.prepare_model_for_kbit_training}
    ours, code = inspect.signature(prepare_model_for_kbit_training), prepare_model_for_kbit_training.__code__
    peft_moe_compat.deactivate()
    assert inspect.signature(prepare_model_for_kbit_training) == ours
    assert "gradient_checkpointing_kwargs" in ours.parameters
    assert prepare_model_for_kbit_training.__code__ is not code
    assert prepare_model_for_kbit_training.__code__.co_filename == peft.utils.other.__file__
    assert not vars(prepare_model_for_kbit_training)
    peft_moe_compat.activate()
    assert prepare_model_for_kbit_training.__code__ is code


def test_arguments_arrive_and_an_error_leaves_the_model_whole():
    model, seen = half_model(zoo.FAMILIES[0]), []
    names = [name for name, _ in model.named_parameters()]
    model.is_loaded_in_4bit = True

    def enable(gradient_checkpointing_kwargs):
        seen.append(gradient_checkpointing_kwargs)
        raise KeyError("there")

    model.gradient_checkpointing_enable = enable
    with pytest.raises(KeyError, match="there"):
        prepare_model_for_kbit_training(model, True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert seen == [{"use_reentrant": False}]
    assert [name for name, _ in model.named_parameters()] == names
    model.is_loaded_in_4bit = False
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def test_somebody_elses_code_is_called_by_ours_and_comes_back():
    peft_moe_compat.deactivate()
    function = prepare_model_for_kbit_training
    code = function.__code__
    function.__code__ = theirs = (lambda model, *args, **kwargs: list(model.named_parameters())).__code__
    model = zoo.tiny_model(zoo.FAMILIES[-1]).bfloat16()
    names = [name for name, _ in model.named_parameters()]
    try:
        with peft_moe_compat.activate():
            seen = [name for name, _ in function(model)]
        assert function.__code__ is theirs
    finally:
        function.__code__ = code
    assert set(names) - set(seen) == (
        {n for n in names if "experts" in n and "gate.w" not in n} if zoo.FUSED else set()
    )


def test_a_model_without_experts_is_none_of_its_business():
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    assert prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).weight.dtype == torch.float32
