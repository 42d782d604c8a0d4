"""The fuzzer for some seconds, and that it finds what is planted. `run.py` runs it for as long as one likes."""

from __future__ import annotations

from collections import Counter

import pytest

from fuzz import run as runner
from fuzz.cases import ALSO, FORMS, TARGETS, VLLM, draw
from fuzz.damages import NAMES
from fuzz.run import attempt, shrink
from peft_moe_compat import layout
from peft_moe_compat.adapters import convert, outputs, verify

BLOCK = 50


@pytest.mark.parametrize("start", range(0, 300, BLOCK))
def test_nothing_is_found(start):
    tally = Counter()
    for seed in range(start, start + BLOCK):
        case = draw(seed, NAMES)
        violation = attempt(case, tally)
        if violation is not None:
            small, shown = shrink(case, violation)
            pytest.fail(f"case {seed}: {shown}\n  python tests/fuzz/run.py --replay '{small.to_json()}'")
    assert tally["compared"] > BLOCK / 2, tally


def found(cases=60):
    """Kinds of what the undamaged cases of the first integers break."""
    violations = (attempt(draw(seed, ()), Counter()) for seed in range(cases))
    return {violation.kind for violation in violations if violation is not None}


def test_a_wrong_layout_is_found(monkeypatch):
    def grouped(lora, *, orientation):
        return layout.to_flat(lora, orientation=orientation, packing="grouped")

    monkeypatch.setattr(outputs, "to_flat", grouped)
    assert "convert changes what the file means" in found()


def test_a_foreign_exception_is_found(monkeypatch):
    def check(name, tensor):
        raise KeyError(name)

    monkeypatch.setattr(convert, "check_finite", check)
    assert found(10) == {"convert raises KeyError"}


def test_a_blind_comparison_is_found(monkeypatch):
    monkeypatch.setattr(verify, "relative", lambda squares, norm: 0.0)
    assert {"verify is blind to a changed value", "verify is blind to another alpha"} & found(30)


def test_commands_and_loading_are_tried():
    tally = Counter()
    for case in (case for case in (draw(seed, ()) for seed in range(900)) if case.also):
        violation = attempt(case, tally)
        assert violation is None, f"{violation}\n  python tests/fuzz/run.py --replay '{case.to_json()}'"
    assert tally["commands: convert 0"] > 5 < tally["commands: merge 0"], tally
    assert tally["loading: loaded"] > 0, tally


def test_two_processes_do_what_one_does(monkeypatch):
    monkeypatch.setattr(runner, "BLOCK", 10)
    alone, shared = ([did for _, did, _ in runner.blocks(0, 25, jobs)] for jobs in (1, 2))
    assert sum(alone, Counter()) == sum(shared, Counter())


def test_every_form_and_damage_is_drawn():
    cases = [draw(seed, NAMES) for seed in range(1000)]
    assert {case.form for case in cases} == set(FORMS)
    assert {case.also for case in cases} == set(ALSO)
    assert {to for case in cases for to in case.to} >= {*TARGETS, *VLLM} - {TARGETS[0]}
    assert {name for case in cases for name in case.damages} == set(NAMES)
