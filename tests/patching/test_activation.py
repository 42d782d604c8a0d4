"""Activation: visible, idempotent, reversible, patient with import orders, and wary of other people's patches."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from support import zoo
from support.limits import seconds

import peft_moe_compat
from peft_moe_compat import CompatWarning, PatchConflictError, UnsupportedPeftError
from peft_moe_compat.model.wrappers import TAKEN_IMPLEMENTATIONS
from peft_moe_compat.patching import activation as patch
from peft_moe_compat.patching.forward import experts_registry

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def run(code: str, **environment: str) -> str:
    """The output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore::FutureWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def state():
    """Everything activation touches: the class's own forward, and the registry's own and shared entries."""
    registry = experts_registry()
    entries = {} if registry is None else {k: registry[k] for k in TAKEN_IMPLEMENTATIONS if k in registry}
    local = {} if registry is None else dict(registry._local_mapping)
    return ParamWrapper.__dict__["forward"], entries, local


def test_on_off_on_puts_back_exactly_what_was_there():
    peft_moe_compat.deactivate()
    before = state()
    for _ in range(2):
        handle = peft_moe_compat.activate()
        assert handle is peft_moe_compat.activate()
        assert handle.active
        assert peft_moe_compat.is_active()
        assert state()[0] is not before[0]
        handle.restore()
        handle.restore()
        assert not handle.active
        assert state() == before
    with peft_moe_compat.activate():
        assert peft_moe_compat.is_active()
    peft_moe_compat.deactivate()
    assert state() == before


@zoo.needs_registry
def test_an_entry_the_user_had_registered_locally_comes_back():
    registry = experts_registry()
    peft_moe_compat.deactivate()
    stock = registry["grouped_mm"]
    registry["grouped_mm"] = stock
    with peft_moe_compat.activate():
        assert registry["grouped_mm"] is not stock
    assert registry._local_mapping["grouped_mm"] is stock
    del registry["grouped_mm"]


def test_a_foreign_patch_is_refused_by_name_and_nothing_is_touched():
    peft_moe_compat.deactivate()
    genuine = ParamWrapper.forward

    @functools.wraps(genuine)
    def foreign(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs)

    ParamWrapper.forward = foreign
    try:
        before = state()
        with pytest.raises(PatchConflictError, match=r"ParamWrapper.forward is already patched by patching.test_a"):
            peft_moe_compat.activate()
        assert state() == before
        assert not peft_moe_compat.is_active()
        patch._waiting = True
        with pytest.warns(CompatWarning, match="inactive.*already patched by patching.test_activation"):
            patch._activate_or_warn(None)
    finally:
        ParamWrapper.forward = genuine


@zoo.needs_registry
def test_a_foreign_registry_entry_is_refused_too():
    registry = experts_registry()
    peft_moe_compat.deactivate()
    before = state()
    registry["batched_mm"] = lambda *args, **kwargs: None
    try:
        with pytest.raises(PatchConflictError, match="'batched_mm' is already patched by patching.test_a"):
            peft_moe_compat.activate()
        assert state()[0] is before[0]
    finally:
        del registry["batched_mm"]


def test_a_with_block_brings_back_the_state_before_it():
    assert peft_moe_compat.is_active()
    with peft_moe_compat.activate(), peft_moe_compat.activate() as handle:
        assert "active; lora_A spans" in repr(handle)
    assert peft_moe_compat.is_active()
    peft_moe_compat.deactivate()
    with peft_moe_compat.activate():
        with peft_moe_compat.activate():
            pass
        assert peft_moe_compat.is_active()
    assert not peft_moe_compat.is_active()


@pytest.mark.parametrize(("value", "off"), [("0", True), ("false", True), ("OFF", True), ("1", False), ("", False)])
def test_what_switches_the_import_off(value, off, monkeypatch):
    monkeypatch.setenv("PEFT_MOE_COMPAT", value)
    assert patch.switched_off() is off


def mixtral_like():
    """A holder of a decorated experts class with LoRA on both projections, and what its forward takes."""
    if not zoo.FUSED:
        pytest.skip("transformers before 5.0 decorates no experts class")
    holder = zoo.wrap(zoo.build(next(c for c in zoo.DECORATED if c.package == "mixtral")), TARGETS)
    return holder, (torch.randn(zoo.T, zoo.H), *zoo.routing())


def test_an_implementation_registered_later_is_heard(stock):
    holder, given = mixtral_like()
    registry = experts_registry()
    ours = registry["grouped_mm"]
    calls = []

    def theirs(self, *args):
        calls.append(self)
        return args[0] * 2

    type(registry).register("grouped_mm", theirs)
    try:
        with pytest.warns(CompatWarning, match="'grouped_mm' is that of patching.test_activation; undo that"):
            out = holder["experts"](*given)
        assert torch.equal(holder["experts"](*given), out)  # and says so once
        assert len(calls) == 2
        assert torch.equal(out, given[0] * 2)
        (row,) = peft_moe_compat.report(holder).rows
        assert "'grouped_mm' is that of patching.test_activation" in row.parameters[0].reason
        with pytest.raises(PatchConflictError, match="'grouped_mm' is already patched by patching.test_activation"):
            peft_moe_compat.activate()
        peft_moe_compat.deactivate()
        assert registry["grouped_mm"] is theirs
    finally:
        type(registry).register("grouped_mm", ours)


def test_a_hook_that_drops_the_factors_is_an_error_not_a_silent_loss():
    holder, given = mixtral_like()
    experts = zoo.wrappers(holder)[0].get_base_layer()
    hook = experts.register_forward_pre_hook(lambda m, args, kwargs: (args, {}), with_kwargs=True)
    with pytest.raises(peft_moe_compat.PeftMoeCompatError, match="ran without its LoRA.*'expert_lora'"):
        holder["experts"](*given)
    hook.remove()
    holder["experts"](*given)


def test_an_instance_forward_under_accelerates_hook_is_not_mistaken_for_the_classs():
    from accelerate.hooks import ModelHook, add_hook_to_module

    from peft_moe_compat.model.wrappers import native_reason

    holder, _ = mixtral_like()
    wrapper = zoo.wrappers(holder)[0]
    experts = wrapper.get_base_layer()
    experts.forward = lambda *args, **kwargs: args[0]
    add_hook_to_module(experts, ModelHook())
    assert native_reason(wrapper).code == "forward_replaced"


def test_an_unsupported_peft_raises_on_request_and_warns_on_import(monkeypatch):
    from peft_moe_compat.model import probe

    def refuse():
        raise UnsupportedPeftError("no rule for this one")

    peft_moe_compat.deactivate()
    monkeypatch.setattr(probe, "installed_rule", refuse)
    with pytest.raises(UnsupportedPeftError, match="no rule"):
        peft_moe_compat.activate()
    monkeypatch.setattr(patch, "_waiting", True)
    with pytest.warns(CompatWarning, match="inactive: no rule"):
        patch._activate_or_warn(None)
    assert not peft_moe_compat.is_active()


def test_threads_activate_once_while_others_run_forwards():
    """Whenever a forward meets the activation, it gives PEFT's numbers: neither path leaves state on the module."""
    peft_moe_compat.deactivate()
    holder = zoo.wrap(zoo.build(next(c for c in zoo.CLASSES if c.package in ("mixtral", "llama4"))), TARGETS)
    index, weights = zoo.routing()
    hidden = torch.randn(zoo.E * zoo.T if "Llama4" in repr(holder) else zoo.T, zoo.H)
    given = (hidden,) if "Llama4" in repr(holder) else (hidden, index, weights)
    expected = holder["experts"](*given)
    handles, wrong = set(), []
    barrier = threading.Barrier(6)

    def toggle():
        barrier.wait()
        for _ in range(50):
            handles.add(id(peft_moe_compat.activate()))

    def forward():
        barrier.wait()
        # PEFT's own forward parametrizes the shared module, so threads take copies of their own.
        mine = copy.deepcopy(holder)
        for _ in range(20):
            out = mine["experts"](*given)
            if not torch.allclose(out, expected, atol=1e-4):
                wrong.append(out)

    threads = [threading.Thread(target=t) for t in (toggle, toggle, toggle, forward, forward, forward)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 1
    assert wrong == []


def test_the_import_is_light_and_waits_for_peft():
    """One interpreter, looked at after each import: what came with it, and whether the library is active."""
    out = run(
        """
        import sys

        def came():
            heavy = ("torch", "numpy", "transformers", "peft", "torch._dynamo", "triton")
            print(*[m for m in heavy if m in sys.modules], peft_moe_compat.is_active())

        import peft_moe_compat; came()
        import peft_moe_compat.releases; came()
        import peft_moe_compat.layout; came()
        import peft_moe_compat.forward.layer, peft_moe_compat.model.wrappers, peft_moe_compat.reporting
        came()
        import pkgutil, peft_moe_compat.adapters
        for module in pkgutil.iter_modules(peft_moe_compat.adapters.__path__, "peft_moe_compat.adapters."):
            __import__(module.name)
        came()
        import peft; came()
        """
    )
    *light, last = [line.replace(" numpy", "") for line in out.split("\n")]  # torch brings numpy where it is installed
    assert light == ["False", "False", "torch False", "torch False", "torch False"]
    assert last.startswith("torch transformers peft")
    assert last.endswith("True")


def test_the_package_itself_imports_in_well_under_100_ms():
    """Without wrapt, whose release 2.5 imports asyncio and takes some 90 ms by itself."""
    # Processor time, so that what else runs on the machine does not count.
    code = "import time, wrapt; s = time.process_time(); import peft_moe_compat; print(time.process_time() - s)"
    # Without coverage's tracing, which would be most of it.
    untraced = {name: "" for name in os.environ if name.startswith("COVERAGE_")}
    fastest = min(float(run(code, **untraced)) for _ in range(5))
    assert fastest < seconds(0.08, child=True)


@pytest.mark.parametrize(
    "imports", ["import peft; import peft_moe_compat", "import peft_moe_compat; peft_moe_compat.activate()"]
)
def test_the_other_import_orders_end_active(imports):
    out = run(f"{imports}\nimport peft_moe_compat as p; h = p.activate(); print(p.is_active(), h is p.activate())")
    assert out == "True True"


def test_the_import_activates_unless_switched_off(monkeypatch):
    peft_moe_compat.deactivate()
    monkeypatch.setenv("PEFT_MOE_COMPAT", "0")
    patch.activate_on_import()
    assert not peft_moe_compat.is_active()
    monkeypatch.setenv("PEFT_MOE_COMPAT", "1")
    patch.activate_on_import()
    assert peft_moe_compat.is_active()


def test_deactivating_cancels_a_wait_for_peft(monkeypatch):
    peft_moe_compat.deactivate()
    monkeypatch.setattr(patch, "_waiting", True)
    peft_moe_compat.deactivate()
    patch._activate_or_warn(None)
    assert not peft_moe_compat.is_active()


def test_every_public_name_is_there_and_an_unknown_one_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in peft_moe_compat.__all__:
            assert getattr(peft_moe_compat, name) is not None
    assert set(peft_moe_compat.__all__) <= set(dir(peft_moe_compat))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        peft_moe_compat.nonsense  # noqa: B018
