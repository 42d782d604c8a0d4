"""`PEFT_MOE_COMPAT_REPORT=1` and `ReportCallback`: the report once, after the first forward or step."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from support import zoo
from torch.nn.modules import module as hooks
from transformers import Trainer, TrainingArguments

import peft_moe_compat
from peft_moe_compat import CompatWarning, showing


@pytest.fixture
def said(caplog):
    """What has been logged since it was last asked."""

    def read():
        records = [record for record in caplog.records if record.name == "peft_moe_compat"]
        caplog.clear()
        assert all(record.levelno == logging.WARNING for record in records)  # shown where nobody configured logging
        return [record.getMessage() for record in records]

    return read


@pytest.fixture
def waiting():
    """As PEFT's import makes it; takes the hooks away where a test did not get that far."""
    found = []

    def start():
        found.append(showing.FirstForward())
        return found[-1]

    yield start
    for waits in found:
        waits.remove()


@pytest.fixture
def model():
    return zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[0]))


def test_of_one_model_it_is_shown_once(said, model):
    """Asked for by the environment and by a plugin."""
    showing.show(model)
    showing.show(torch.nn.Sequential(model))
    assert len(said()) == 1
    showing.show(zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[0])))
    assert len(said()) == 1


def installed():
    return len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks)


def test_the_report_comes_once_and_leaves_nothing_behind(said, waiting, model):
    before = installed()
    waiting()
    torch.nn.Sequential(zoo.tiny_model(zoo.FAMILIES[0]).lm_head)(torch.zeros(1, 32))
    zoo.tiny_model(zoo.FAMILIES[0])(input_ids=zoo.token_ids())
    assert said() == []
    model(input_ids=zoo.token_ids())
    assert said() == [str(peft_moe_compat.report(model))]
    model(input_ids=zoo.token_ids())
    assert said() == []
    assert installed() == before


def test_a_wrapper_around_the_model_is_looked_into(said, waiting, model):
    waiting()
    torch.nn.ModuleDict({"module": model})["module"].generate(input_ids=zoo.token_ids(), max_new_tokens=2, min_length=2)
    (text,) = said()
    assert "experts" in text


def test_what_is_wrong_is_said_and_not_raised(said, waiting):
    """The tests' own filter makes an error of the warning that `report` gives."""
    waiting()
    base = zoo.tiny_model(zoo.FAMILIES[0])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model(input_ids=zoo.token_ids())
    (text,) = said()
    assert "warning: 4 of 4 expert parameters are not adapted" in text


@zoo.needs_registry
def test_a_displaced_forward_is_named(said, waiting, model, monkeypatch):
    """Also where it fails, as Liger's does."""

    def theirs(self, *args, **kwargs):
        raise NotImplementedError

    monkeypatch.setenv("COLUMNS", "400")  # so that no sentence is folded
    before = installed()
    waiting()
    with monkeypatch.context() as patched:
        patched.setattr(ParamWrapper, "forward", theirs)
        with pytest.warns(CompatWarning, match="does not come to"), pytest.raises(NotImplementedError):
            model(input_ids=zoo.token_ids())
        (text,) = said()
    assert f"ParamWrapper.forward is that of {__name__}" in text
    model(input_ids=zoo.token_ids())
    assert said() == []
    assert installed() == before


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_a_group_speaks(rank, said, waiting, model, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    waiting()
    model(input_ids=zoo.token_ids())
    assert len(said()) == (rank == "0")


@zoo.needs_registry
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_stays_one_graph(in_place, said, waiting, model):
    waiting()
    if in_place:
        model.compile(backend="eager", fullgraph=True)
    compiled = model if in_place else torch.compile(model, backend="eager", fullgraph=True)
    compiled(input_ids=zoo.token_ids())
    assert len(said()) == (not in_place)


@pytest.mark.parametrize(("value", "waits"), [("1", True), ("yes", True), ("0", False), ("", False), ("False", False)])
def test_the_environment_asks_for_it(value, waits, monkeypatch):
    made = []
    monkeypatch.setenv("PEFT_MOE_COMPAT_REPORT", value)
    monkeypatch.setattr(showing, "FirstForward", lambda: made.append(1))
    showing.report_on_import()
    assert bool(made) is waits


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_callback_shows_it_after_the_first_batch(accumulated, said, model, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in zoo.token_ids(batch=4)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulated,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[peft_moe_compat.ReportCallback()]).train()
    assert said() == [str(peft_moe_compat.report(model))]
