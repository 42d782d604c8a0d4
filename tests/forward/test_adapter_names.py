"""`adapter_names`: each sample of a batch with the adapter it names, against stock PEFT with each sample alone."""

from __future__ import annotations

import pytest
import torch
from support import zoo
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_moe_compat import LayoutError
from peft_moe_compat.forward import dropout
from peft_moe_compat.patching import handed_down

FAMILIES = pytest.mark.parametrize("family", zoo.FAMILIES)
ONE = zoo.FAMILIES[0]
NAMES = ["second", "default", "__base__", "second", "third", "default"]


def model_of(family, **config):
    """With adapters of three ranks and scalings, the third on the down projections alone."""
    model = zoo.peft_model(zoo.tiny_model(family, **config)).eval()
    for wrapper in zoo.wrappers(model):
        zoo.add_adapter(wrapper, "second", 5)
        if wrapper.parameter_name == "down_proj":
            zoo.add_adapter(wrapper, "third", 1, scaling=2.0)
    zoo.randomise(model)
    return model, torch.randint(1, 60, (len(NAMES), 7))


def gradients(model):
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters())
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    model.zero_grad()
    return {name: gradient for name, gradient in found.items() if gradient.count_nonzero()}


def weighed(logits):
    """Differently for each element."""
    return logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)


def alone(model, ids, names):
    """Logits of each sample with its adapter active, and the gradients of their weighed sum."""
    logits = []
    for row, name in zip(ids, names, strict=True):
        for wrapper in zoo.wrappers(model):
            wrapper._active_adapter = [name]
        logits.append(model(input_ids=row[None]).logits)
        if name != "__base__":
            weighed(logits[-1]).sum().backward()
    return {"logits": torch.cat(logits).detach()} | gradients(model)


def together(model, ids, names):
    logits = model(input_ids=ids, adapter_names=names).logits
    sum(weighed(each).sum() for each in logits).backward()
    return {"logits": logits.detach()} | gradients(model)


@zoo.needs_registry
@FAMILIES
def test_each_sample_has_its_own_adapter(family, stock):
    model, ids = model_of(family)
    exact = stock(alone, model, ids, NAMES)
    zoo.assert_same(together(model, ids, NAMES), exact, 1e-4)
    assert sum("second" in name for name in exact) == sum("default" in name for name in exact) > 0
    assert any("third" in name for name in exact)


@zoo.needs_registry
@FAMILIES
@pytest.mark.parametrize("names", [NAMES, sorted(NAMES), ["second"] * len(NAMES)], ids=["mixed", "sorted", "one"])
def test_each_adapter_may_have_a_pass_of_its_own(family, names, stock, monkeypatch):
    """As the fused kernels, which are none faster on a CPU, have it."""
    passes = []
    monkeypatch.setattr(handed_down, "runs_fused", lambda *_: True)
    monkeypatch.setattr(handed_down, "_TOKENS_OF_A_PASS", 7)
    once = handed_down.experts_forward
    monkeypatch.setattr(handed_down, "experts_forward", lambda *args: (passes.append(len(args)), once(*args))[1])
    model, ids = model_of(family)
    zoo.assert_same(together(model, ids, names), stock(alone, model, ids, names), 1e-4)
    layers = len({id(wrapper.get_base_layer()) for wrapper in zoo.wrappers(model)})
    assert passes == [5] * layers * len(set(names))
    monkeypatch.setattr(handed_down, "_TOKENS_OF_A_PASS", 7 * len(names))
    passes.clear()
    together(model, ids, names)
    assert passes == [5 if len(set(names)) == 1 else 6] * layers


@zoo.needs_registry
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant", "torch's wrapper"])
def test_training_takes_them_too(checkpointing):
    model, ids = model_of(ONE, use_cache=False)
    expected = together(model, ids, NAMES)
    model.train()
    if "reentrant" in checkpointing:
        how = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    elif "wrapper" in checkpointing:
        layers = model.get_base_model().model.layers
        layers[0].mlp = checkpoint_wrapper(layers[0].mlp)
    held = [vars(module).copy() for module in model.modules()]
    zoo.assert_same(together(model, ids, NAMES), expected, 1e-5)
    first = model(input_ids=ids, adapter_names=NAMES).logits
    model(input_ids=ids, adapter_names=NAMES[::-1])  # before the first is computed again
    sum(weighed(each).sum() for each in first).backward()
    zoo.assert_same({"logits": first.detach()} | gradients(model), expected, 1e-5)
    assert all(before == vars(module) for before, module in zip(held, model.modules(), strict=True))


@zoo.needs_registry
def test_each_has_its_own_dropout(monkeypatch):
    """All of it, or none."""
    model, ids = model_of(ONE)
    base = model(input_ids=ids, adapter_names=["__base__"] * len(NAMES)).logits
    expected = model(input_ids=ids, adapter_names=NAMES).logits
    for wrapper in zoo.wrappers(model):
        wrapper.lora_dropout["second"] = torch.nn.Dropout(1.0)
    logits = model.train()(input_ids=ids, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(logits[i], (base if name == "second" else expected)[i], rtol=0, atol=1e-4)
        assert name == "__base__" or (base[i] - expected[i]).abs().max() > 1e-3
    rows = torch.ones(2, 10_000)
    mask = dropout.kept(rows, torch.tensor([[0.25], [0.5]]), 3, torch.arange(2))
    assert [round(share, 1) for share in mask.count_nonzero(1).div(1e4).tolist()] in ([0.7, 0.5], [0.8, 0.5])
    torch.testing.assert_close(mask[0].unique(), torch.tensor([0, 4 / 3]))
    assert torch.equal(dropout.kept(rows, torch.tensor([[0.25], [0.5]]), 3, torch.arange(2)), mask)


@zoo.needs_registry
def test_generation_takes_them():
    model, ids = model_of(ONE)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, **how)
    for i, name in enumerate(NAMES):
        one = model.generate(input_ids=ids[i : i + 1], attention_mask=torch.ones(1, 7), adapter_names=[name], **how)
        assert torch.equal(found[i : i + 1, : one.shape[1]], one)


@zoo.needs_registry
def test_what_cannot_be_mixed_is_refused():
    model, ids = model_of(ONE)
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=ids, adapter_names=NAMES[:5])
    with pytest.raises(ValueError, match="non-existing"):
        model(input_ids=ids, adapter_names=["nobody"] * len(NAMES))
    zoo.wrappers(model)[0].merge(adapter_names=["default"])
    with pytest.raises(LayoutError, match="unmerge"):
        model(input_ids=ids, adapter_names=NAMES)
    model, ids = model_of(ONE, experts_implementation="eager")
    with pytest.raises(LayoutError, match="eager"):
        model(input_ids=ids, adapter_names=NAMES)


@zoo.needs_registry
@pytest.mark.parametrize("names", [None, NAMES])
def test_a_model_that_nothing_is_lifted_of_is_not_written_to(names, monkeypatch):
    model, ids = model_of(ONE)
    model.train(names is None)
    cls, written = type(model.base_model), []
    setting = cls.__setattr__

    def noting(self, name, value):
        written.append(name)
        setting(self, name, value)

    monkeypatch.setattr(cls, "__setattr__", noting)
    model(input_ids=ids, adapter_names=names)
    assert written == []
