"""What is said of forwards that somebody has put in front of ours: whether they come to it, whoever they are."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft.tuners.lora.layer import ParamWrapper
from support import zoo

import peft_moe_compat
from peft_moe_compat import CompatWarning, PatchConflictError, is_active, report

pytestmark = zoo.needs_registry  # PEFT's own forward runs everything beside transformers 4
IDS = zoo.token_ids()


@pytest.fixture
def model():
    return zoo.peft_model(zoo.tiny_model("qwen3_moe"))


@pytest.fixture(autouse=True)
def _forward_as_it_was():
    peft_moe_compat.deactivate()
    forward = ParamWrapper.forward
    peft_moe_compat.activate()
    yield
    ParamWrapper.forward = forward
    peft_moe_compat.deactivate()


def calling_on(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapper


def replacing(self, x, *args, **kwargs):
    """By itself, with the numbers of a base without LoRA."""
    return self.base_layer(x, *args, **kwargs)


def silently(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **kwargs)


def forward_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def paths(model):
    return {parameter.path for row in report(model).rows for parameter in row.parameters}


def test_a_wrapper_that_calls_on_takes_the_fast_path_and_nothing_is_said(model):
    """Axolotl's, which leaves experts that are not its own to what was there."""
    expected = forward_of(model)
    ParamWrapper.forward = calling_on(ParamWrapper.forward)
    assert is_active()
    assert silently(paths, model) == {"grouped_mm"}
    assert torch.equal(silently(forward_of, model), expected)
    assert silently(paths, model) == {"grouped_mm"}


def test_a_forward_that_does_not_call_on_is_noticed_at_the_next_call_once(model):
    ParamWrapper.forward = replacing
    with pytest.warns(
        CompatWarning, match=r"that of patching.test_reach, which does not come to.*activate\(\)"
    ) as said:
        forward_of(model)
    assert len(said) == 1
    silently(forward_of, model)
    assert not is_active()
    found = silently(report, model)
    assert not found.active
    assert {parameter.path for row in found.rows for parameter in row.parameters} == {"peft"}
    assert "4 expert parameters do not run in peft_moe_compat's forward" in found.warnings[0]
    assert "that of patching.test_reach" in found.rows[0].parameters[0].reason


def test_or_at_the_next_report(model):
    ParamWrapper.forward = replacing
    with pytest.warns(CompatWarning, match="ParamWrapper.forward is that of patching.test_reach"):
        assert not report(model).active
    silently(forward_of, model)


def test_a_forward_that_comes_to_ours_for_some_experts_only_is_taken_at_its_deeds(model):
    ours, first = ParamWrapper.forward, zoo.wrappers(model)[0]

    def choosing(self, *args, **kwargs):
        return (replacing if self is first else ours)(self, *args, **kwargs)

    ParamWrapper.forward = choosing
    with pytest.warns(CompatWarning, match="test_reach"):
        forward_of(model)
    assert is_active()
    rows = [parameter for row in report(model).rows for parameter in row.parameters]
    assert [row.path for row in rows].count("peft") == 1


def test_a_forward_bound_to_one_wrapper_is_noticed_there(model):
    first = zoo.wrappers(model)[0]
    first.forward = replacing.__get__(first)
    with pytest.warns(CompatWarning, match="1 expert parameters do not .* forward of patching.test_reach is bound"):
        report(model)
    assert is_active()
    first.forward = calling_on(type(first).forward).__get__(first)
    silently(forward_of, model)
    assert silently(paths, model) == {"grouped_mm"}


def test_accelerates_hook_on_a_wrapper_is_not_taken_for_somebody_elses_forward(model):
    for wrapper in zoo.wrappers(model):
        add_hook_to_module(wrapper, ModelHook())
    silently(forward_of, model)
    assert silently(paths, model) == {"grouped_mm"}


def test_one_that_calls_on_is_wrapped_and_comes_back(model):
    """Theirs first: on, off and on, and gone while ours is on."""
    peft_moe_compat.deactivate()
    stock = ParamWrapper.forward
    ParamWrapper.forward = theirs = calling_on(stock)
    for _ in range(2):
        with peft_moe_compat.activate():
            assert silently(paths, model) == {"grouped_mm"}
            silently(forward_of, model)
        assert ParamWrapper.forward is theirs
    peft_moe_compat.activate()
    ParamWrapper.forward = stock  # they undo their patch
    assert not is_active()
    with pytest.warns(CompatWarning, match=r"that of peft.tuners.lora.layer, .*activate\(\)"):
        forward_of(model)
    assert peft_moe_compat.activate().active
    assert is_active()
    assert silently(paths, model) == {"grouped_mm"}
    peft_moe_compat.deactivate()
    assert ParamWrapper.forward is stock


def test_one_on_top_of_ours_goes_on_when_ours_is_off_and_on_again(model, stock):
    expected = stock(forward_of, model)
    ours = ParamWrapper.forward
    ParamWrapper.forward = theirs = calling_on(ours)
    peft_moe_compat.deactivate()
    assert ParamWrapper.forward is theirs
    assert not is_active()
    assert torch.equal(forward_of(model), expected)
    with peft_moe_compat.activate():
        assert silently(paths, model) == {"grouped_mm"}
        silently(forward_of, model)
    ParamWrapper.forward = ours  # as they found it
    assert torch.equal(forward_of(model), expected)
    with peft_moe_compat.activate():
        assert silently(paths, model) == {"grouped_mm"}
        silently(forward_of, model)


def test_one_that_does_not_call_on_is_refused_whenever_ours_would_go_on_top(model):
    ParamWrapper.forward = replacing
    with pytest.raises(PatchConflictError, match="already patched by patching.test_reach, which does not leave"):
        peft_moe_compat.activate()
    peft_moe_compat.deactivate()
    assert ParamWrapper.forward is replacing
    with pytest.raises(PatchConflictError, match="already patched by patching.test_reach"):
        peft_moe_compat.activate()


def test_a_forward_may_answer_a_tiny_wrapper_with_any_error(model):
    """Before ours and on top of it: activation and reports go on."""

    class NothingOfPython(Exception):
        pass

    for error in (ValueError, ArithmeticError, OSError, NothingOfPython):

        def raising(self, x, *args, error=error, **kwargs):
            raise error("expected (batch, length, hidden)")

        peft_moe_compat.activate()
        ours, ParamWrapper.forward = ParamWrapper.forward, raising
        assert not is_active()
        with pytest.warns(CompatWarning, match="that of patching.test_reach"):
            assert not report(model).active
        with pytest.raises(PatchConflictError, match="already patched by patching.test_reach"):
            peft_moe_compat.activate()
        ParamWrapper.forward = ours
        peft_moe_compat.deactivate()


@pytest.mark.parametrize("bind", ["method", "hook", "unreferable"])
def test_what_a_wrapper_did_does_not_keep_it_alive(bind):
    """Liger binds a method to each, accelerate a partial."""

    class Unreferable:
        __slots__ = ("call",)

        def __init__(self, call):
            self.call = call

        def __call__(self, *args, **kwargs):
            return self.call(*args, **kwargs)

    model = zoo.peft_model(zoo.tiny_model("qwen3_moe"))  # which no fixture keeps
    for wrapper in zoo.wrappers(model):
        if bind == "hook":
            add_hook_to_module(wrapper, ModelHook())
        else:
            wrapper.forward = calling_on(type(wrapper).forward).__get__(wrapper)
        if bind == "unreferable":
            wrapper.forward = Unreferable(wrapper.forward)
    kept = [weakref.ref(wrapper) for wrapper in zoo.wrappers(model)]
    silently(forward_of, model)
    del model, wrapper
    gc.collect()
    assert kept
    assert not any(wrapper() for wrapper in kept)


def test_a_compiled_graph_has_one_frame_with_somebody_in_front(model):
    from torch._dynamo.testing import CompileCounter

    ParamWrapper.forward = calling_on(ParamWrapper.forward)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = forward_of(model)
        for _ in range(2):
            torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected)
    assert counter.frame_count == 1


def test_an_experts_class_whose_forward_somebody_has_replaced_is_named_with_whose_it_is(model, monkeypatch):
    """Unsloth's, imported after this library: PEFT's forward runs around it."""
    cls = type(zoo.wrappers(model)[0].get_base_layer())
    theirs = {"__name__": "unsloth_cached_moe", "torch": torch}
    exec("def forward(self, hidden_states, *routing): return torch.zeros_like(hidden_states)", theirs)
    monkeypatch.setattr(cls, "forward", theirs["forward"])
    with pytest.warns(
        CompatWarning, match=rf"the forward of {cls.__name__} is that of unsloth_cached_moe.*Unsloth trains"
    ):
        forward_of(model)
    silently(forward_of, model)  # once
    assert paths(model) == {"peft"}
    assert "unsloth_cached_moe" in str(report(model).warnings)
