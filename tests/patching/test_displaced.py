"""Loaders and savers of somebody else's in the place of ours: those that do not call on are named."""

from __future__ import annotations

import inspect
import types
from unittest import mock

import peft
import pytest
from peft.tuners.tuners_utils import BaseTuner
from support.saved_adapters import FAMILY, flipped, rewrite, save, written_otherwise

import peft_moe_compat
from peft_moe_compat import CompatWarning, report
from peft_moe_compat.patching import displaced


@pytest.fixture(autouse=True)
def _as_it_was():
    peft_moe_compat.deactivate()
    before = vars(peft.PeftModel).copy()
    with peft_moe_compat.activate():
        yield
    for name in vars(peft.PeftModel).keys() - before.keys():
        delattr(peft.PeftModel, name)
    for name in ("load_adapter", "from_pretrained", "save_pretrained"):
        setattr(peft.PeftModel, name, before[name])


def copied(function):
    """The function as somebody has copied it from PEFT, into a module of their own."""
    code = inspect.unwrap(getattr(function, "__func__", function))
    module = types.ModuleType("somebodys.loader")
    vars(module).update(code.__globals__, __name__="somebodys.loader")
    copy = types.FunctionType(code.__code__, vars(module), code.__name__, code.__defaults__, code.__closure__)
    copy.__kwdefaults__ = code.__kwdefaults__
    return classmethod(copy) if isinstance(function, classmethod) else copy


def through_a_closure(ours):
    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    return theirs


def through_an_attribute(ours):
    """As ms-swift does it."""
    peft.PeftModel.load_adapter_origin = ours

    def theirs(self, *args, **kwargs):
        return self.load_adapter_origin(*args, **kwargs)

    return theirs


def through_a_global(ours):
    scope = {"kept": ours}
    exec("def theirs(self, *args, **kwargs):\n    return kept(self, *args, **kwargs)", scope)
    return scope["theirs"]


WAYS = [through_a_closure, through_an_attribute, through_a_global]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_one_that_calls_on_is_left_in_peace(way, tmp_path):
    _, fresh = save(tmp_path)
    rewrite(tmp_path, flipped, peft_version=written_otherwise())
    peft.PeftModel.load_adapter = way(vars(peft.PeftModel)["load_adapter"])
    model = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    assert not [warning for warning in report(model).warnings if "somebody" in warning or "load_adapter" in warning]
    assert list(displaced.displaced_functions()) == []


def test_a_mock_around_ours_is_too():
    with mock.patch.object(peft.PeftModel, "load_adapter", wraps=vars(peft.PeftModel)["load_adapter"]):
        assert list(displaced.displaced_functions()) == []


@pytest.mark.parametrize("name", ["load_adapter", "from_pretrained", "save_pretrained"])
def test_one_that_does_not_is_named_when_it_is_used_and_in_the_report(name, tmp_path):
    model, fresh = save(tmp_path / "a", family=FAMILY)
    setattr(peft.PeftModel, name, copied(vars(peft.PeftModel)[name]))
    saves, named = name == "save_pretrained", rf"PeftModel.{name} is that of somebodys.loader.*activate\(\)"
    with pytest.warns(CompatWarning, match=named) as said:
        model.save_pretrained(tmp_path / "b") if saves else peft.PeftModel.from_pretrained(fresh(), tmp_path / "a")
    assert len([warning for warning in said if "somebodys" in str(warning.message)]) == 1
    assert [f"PeftModel.{name}" in warning for warning in report(model).warnings] == [True]
    peft_moe_compat.activate()  # which puts ours on top
    assert report(model).warnings == ()


def test_what_is_no_loader_or_saver_is_nobodys_concern(monkeypatch):
    """Axolotl's, which is put there for every run."""
    monkeypatch.setattr(BaseTuner, "_inject_parameters", copied(vars(BaseTuner)["_inject_parameters"]))
    assert list(displaced.displaced_functions()) == []


def test_nothing_is_said_once_it_is_off(tmp_path):
    model, _ = save(tmp_path)
    peft.PeftModel.load_adapter = copied(vars(peft.PeftModel)["load_adapter"])
    peft_moe_compat.deactivate()
    assert not any("load_adapter" in warning for warning in report(model).warnings)
