"""Loaders under somebody else's wrappers, whose signatures say nothing of the arguments they hand on."""

from __future__ import annotations

from contextlib import contextmanager

import peft
import pytest
import transformers
from packaging.version import Version
from peft import PeftModel
from peft.utils import hotswap
from support import zoo
from support.saved_adapters import FAMILY, SQUARE, assert_equal, flipped, rewrite, save, written_otherwise
from transformers import Trainer
from transformers.integrations.peft import PeftAdapterMixin

import peft_moe_compat
from peft_moe_compat.patching import loading, resuming
from peft_moe_compat.patching.opening import written_by

WRAPPERS = {
    "ms-swift's": lambda theirs: lambda self, model_id, *args, **kwargs: theirs(self, model_id, *args, **kwargs),
    "of self": lambda theirs: lambda self, *args, **kwargs: theirs(self, *args, **kwargs),
    "of nothing": lambda theirs: lambda *args, **kwargs: theirs(*args, **kwargs),
    "of one": lambda theirs: lambda *args: theirs(*args),
}
UNDER = pytest.mark.parametrize("wrapper", WRAPPERS)
SIZES = pytest.mark.parametrize("sizes", [None, SQUARE], ids=["rectangles", "squares"])


@contextmanager
def wrapped(wrapper, *places):
    """With that around each (owner, name), put there before this library's."""
    peft_moe_compat.deactivate()
    before = [(owner, name, vars(owner)[name]) for owner, name in places]
    try:
        for owner, name, theirs in before:
            setattr(owner, name, WRAPPERS[wrapper](theirs))
        with peft_moe_compat.activate():
            yield
    finally:
        for owner, name, theirs in before:
            setattr(owner, name, theirs)


@contextmanager
def written(folder, sizes):
    """(expected, fresh) of a file laid out otherwise, which the numbers of squares do not tell."""
    found = save(folder, sizes=sizes, target_parameters=["experts.down_proj"])
    version = written_otherwise()
    rewrite(folder, flipped, peft_version=version)
    with written_by(f"peft=={version},transformers=={transformers.__version__}"):
        yield found


@UNDER
@SIZES
def test_an_adapter_is_loaded_beside_a_trained_one(tmp_path, wrapper, sizes):
    with written(tmp_path, sizes) as (expected, fresh), wrapped(wrapper, (PeftModel, "load_adapter")):
        model = zoo.peft_model(fresh(), target_parameters=["experts.down_proj"])
        if Version(peft.__version__) < Version("0.20"):  # which takes one adapter on parameters
            model.load_adapter(tmp_path, "default")
            assert_equal(model, expected)
            return
        model.load_adapter(tmp_path, "second")
        assert_equal(model, expected, "second")
        if wrapper != "of one":
            model.load_adapter(model_id=tmp_path, adapter_name="third")  # or by upstream's names
            assert_equal(model, expected, "third")


@pytest.mark.parametrize("wrapper", ["ms-swift's", "of self", "of nothing"])  # it hands on keywords
@SIZES
def test_a_model_is_loaded_under_a_name(tmp_path, wrapper, sizes):
    with written(tmp_path, sizes) as (expected, fresh), wrapped(wrapper, (PeftModel, "load_adapter")):
        assert_equal(PeftModel.from_pretrained(fresh(), tmp_path, "ref"), expected, "ref")


@UNDER
def test_the_adapter_that_a_model_of_transformers_loads_is_seen(tmp_path, wrapper, monkeypatch):
    """Theirs patches PEFT for the whole process in some releases, so that it is not run here."""
    loaded, seen = [], []
    monkeypatch.setattr(loading, "understand", lambda model, model_id, hub: seen.append((model, model_id)))
    monkeypatch.setattr(loading, "check_names", lambda *_: None)
    monkeypatch.setattr(PeftAdapterMixin, "load_adapter", lambda self, *args: loaded.append((self, *args)))
    base = zoo.tiny_model(FAMILY)
    with wrapped(wrapper, (PeftAdapterMixin, "load_adapter")):
        base.load_adapter(str(tmp_path), "ref")
    assert (seen, loaded) == ([(base, str(tmp_path))], [(base, str(tmp_path), "ref")])


@SIZES
def test_an_adapter_is_swapped_in(tmp_path, sizes):
    places = (hotswap, "hotswap_adapter"), (hotswap, "hotswap_adapter_from_state_dict")
    with written(tmp_path, sizes) as (expected, fresh), wrapped("of nothing", *places):
        model = zoo.peft_model(fresh(), target_parameters=["experts.down_proj"])
        hotswap.hotswap_adapter(model, str(tmp_path), "default", "cpu")
        assert_equal(model, expected)


def test_from_pretrained_takes_a_name_as_its_wrapper_wants_it(tmp_path, monkeypatch):
    expected, fresh = save(tmp_path)
    peft_moe_compat.deactivate()
    theirs = PeftModel.from_pretrained
    monkeypatch.setattr(
        PeftModel,
        "from_pretrained",
        classmethod(lambda cls, model, model_id, **kwargs: theirs(model, model_id, **kwargs)),
    )
    with peft_moe_compat.activate():
        assert_equal(PeftModel.from_pretrained(fresh(), tmp_path), expected)
        assert_equal(PeftModel.from_pretrained(fresh(), tmp_path, adapter_name="ref"), expected, "ref")


@UNDER
def test_the_checkpoint_to_resume_from_is_seen(tmp_path, wrapper, monkeypatch):
    trained, seen = [], []
    monkeypatch.setattr(resuming, "_refuse_what_stays", lambda trainer, checkpoint: seen.append((trainer, checkpoint)))
    monkeypatch.setattr(Trainer, "train", lambda self, *args: trained.append((self, *args)))
    trainer = object.__new__(Trainer)
    with wrapped(wrapper, (Trainer, "train")):
        trainer.train(str(tmp_path))
    assert (seen, trained) == ([(trainer, tmp_path)], [(trainer, str(tmp_path))])


@pytest.mark.parametrize(
    "call",
    [
        (PeftModel, "load_adapter"),
        (hotswap, "hotswap_adapter"),
        (hotswap, "hotswap_adapter_from_state_dict"),
        (PeftModel, "from_pretrained"),
    ],
)
def test_what_is_missing_is_for_upstream_to_say(call, stock):
    owner, name = call

    def said():
        with pytest.raises(TypeError) as caught:
            getattr(owner, name)()
        return str(caught.value)

    assert said() == stock(said)
