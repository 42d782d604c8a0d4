"""`ExpertReadings`, against a count of the routing, autograd and PEFT's own delta."""

from __future__ import annotations

import json

import pytest
import torch
from support import zoo

from peft_moe_compat import AdapterError, ExpertReadings

FAMILY = zoo.FAMILIES[-1]


def outermost(model):
    inner = {id(wrapper.base_layer) for wrapper in zoo.wrappers(model)}
    return [wrapper for wrapper in zoo.wrappers(model) if id(wrapper) not in inner]


def routed(model, ids):
    """Experts that each token goes to, per layer, from what the experts are called with."""
    found, hooks = [], []
    for wrapper in outermost(model):

        def note(_, args, kwargs):
            found.append(next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.dtype == torch.int64))

        hooks.append(wrapper.register_forward_pre_hook(note, with_kwargs=True))
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tokens_are_those_of_the_routing(checkpointed):
    model, ids = zoo.peft_model(zoo.tiny_model(FAMILY)), zoo.token_ids()
    expected = [torch.bincount(index.flatten(), minlength=6).tolist() for index in routed(model, ids)]
    readings = ExpertReadings(model)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    zoo.loss_and_gradients(model, ids)
    modules = [reading for reading in readings.read() if reading.parameter is None]
    assert [list(reading.tokens) for reading in modules] == expected
    assert all(not any(reading.tokens) for reading in readings.read() if reading.parameter is None), "counted anew"
    model(ids)
    model(ids)
    assert [list(r.tokens) for r in readings.read() if r.parameter is None] == [[2 * n for n in e] for e in expected]
    readings.remove()
    model(ids)
    assert all(not any(reading.tokens) for reading in readings.read() if reading.parameter is None)


def test_a_first_forward_in_inference_mode_counts_like_any():
    model, ids = zoo.peft_model(zoo.tiny_model(FAMILY)), zoo.token_ids()
    readings = ExpertReadings(model)
    with torch.inference_mode():
        model(ids)
    zoo.loss_and_gradients(model, ids)
    each = [index.numel() for index in routed(model, ids)]  # the third
    assert [sum(r.tokens) for r in readings.read() if r.parameter is None] == [3 * n for n in each]


def test_classes_that_are_not_called_with_the_routing_have_no_tokens():
    """aria's older class is given numbers of tokens, "E"."""
    model = zoo.peft_model(zoo.tiny_model(FAMILY))
    readings = ExpertReadings(model)
    wrapper = outermost(model)[0]
    for hook in wrapper._forward_pre_hooks.values():
        hook(wrapper, (torch.zeros(3, 32), torch.tensor([3, 0, 0, 0, 0, 0])), {})
    assert all(reading.tokens is None for reading in readings.read())


def test_an_adapter_of_another_name_is_an_error():
    with pytest.raises(AdapterError, match=r"an adapter 'policy'; they have \['default'\]"):
        ExpertReadings(zoo.peft_model(zoo.tiny_model(FAMILY)), "policy")


@zoo.needs_registry  # PEFT's own forward breaks graphs
def test_counted_within_a_graph_too():
    model, ids = zoo.peft_model(zoo.tiny_model(FAMILY)).eval(), zoo.token_ids()
    expected = [torch.bincount(index.flatten(), minlength=6).tolist() for index in routed(model, ids)]
    readings = ExpertReadings(model)
    wrapper = outermost(model)[0]
    compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = []
        hook = wrapper.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
        model(ids)
        hook.remove()
        args, kwargs = found[0]
        readings.read()
        compiled(*args, **kwargs)
        compiled(*args, **kwargs)
    tokens = [reading.tokens for reading in readings.read() if reading.parameter is None]
    assert list(tokens[0]) == [2 * n for n in expected[0]]


def test_norms_are_those_of_pefts_own_delta_and_of_the_gradients():
    model, ids = zoo.peft_model(zoo.tiny_model(FAMILY)), zoo.token_ids()
    readings = ExpertReadings(model)
    assert all(reading.gradients is None for reading in readings.read())
    zoo.loss_and_gradients(model, ids)
    found = {(r.module, r.parameter): r for r in readings.read() if r.parameter}
    assert len(found) == len(zoo.wrappers(model))
    for reading in found.values():
        module = model.get_base_model().get_submodule(reading.module)
        wrapper = module
        while wrapper.parameter_name != reading.parameter:
            wrapper = wrapper.base_layer
        E, r = wrapper.num_experts, wrapper.r["default"]
        deltas = wrapper.get_delta_weight("default").double()
        torch.testing.assert_close(
            torch.tensor(reading.updates).double(), deltas.flatten(1).norm(dim=1), rtol=1e-4, atol=0
        )
        A, B = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
        for expert in range(E):
            of_expert = A[expert * r : (expert + 1) * r].square().sum() + B[:, expert::E].square().sum()
            assert reading.gradients[expert] == pytest.approx(of_expert.sqrt().item(), rel=1e-4)


def test_numbers_for_a_logger():
    model = zoo.peft_model(zoo.tiny_model(FAMILY))
    readings = ExpertReadings(model)
    zoo.loss_and_gradients(model, torch.full((1, 2), 7))  # two tokens alike: most experts get none
    numbers = readings.numbers()
    assert json.loads(json.dumps(numbers)) == numbers
    assert all(isinstance(value, (int, float)) for value in numbers.values())
    assert {name.rpartition("/")[2] for name in numbers} == {
        "tokens_max",
        "tokens_min",
        "update_mean",
        "update_max",
        "without_gradient",
    }
    assert all(value == 0 for name, value in numbers.items() if name.endswith("tokens_min"))
    idle = [value for name, value in numbers.items() if name.endswith("without_gradient")]
    assert min(idle) >= 6 - 4
