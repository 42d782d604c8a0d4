"""Reasons and remedies are values; their sentences stand in one table, and none is without a reason that it is for."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from string import Formatter

import pytest

import peft_moe_compat.adapters
from peft_moe_compat.adapters.conclusions import SENTENCES, Conclusion, Evidence, Finding, Settle
from peft_moe_compat.adapters.stated import Stated

ROOM = Path(peft_moe_compat.adapters.__file__).parent


def calls(name: str):
    """Arguments of every call of that name in adapters: the value of a constant, else the syntax."""
    for file in sorted(ROOM.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield [argument.value if isinstance(argument, ast.Constant) else argument for argument in node.args]


def test_every_reason_has_its_sentence_and_every_sentence_its_reason():
    found = list(calls("Evidence"))
    assert {code for code, *_ in found} == set(SENTENCES)
    checked = 0
    for code, *detail in found:
        if not detail or isinstance(detail[0], ast.Dict):
            given = {key.value for key in detail[0].keys} if detail else set()
            assert given == {name for _, name, _, _ in Formatter().parse(SENTENCES[code]) if name}, code
            checked += 1
    assert checked > 30


def test_what_settles_a_question_is_something_the_caller_can_say():
    arguments = {argument for argument, *_ in calls("Settle")}
    assert arguments == {"model", "written_by", "orientation", "packing", "nesting"}
    assert arguments == {field.name for field in fields(Stated)}


def test_a_reason_about_a_reason_is_one_sentence():
    shapes = Evidence("shapes", {"count": 2})
    assert (
        str(Evidence("fit_alone", {"what": shapes, "orientation": "linear"})) == "shapes of 2 modules fit linear alone"
    )


@pytest.mark.parametrize(
    ("settle", "remedy"),
    [
        ((), ""),
        ((Settle("written_by", "peft==VERSION"),), "--written-by peft==VERSION"),
        (
            (Settle("model", "BASE"), Settle("written_by", "peft==VERSION", "both")),
            "--model BASE, or --written-by peft==VERSION, or both",
        ),
        ((Settle("model", "a/b", "config"),), "--model a/b (the base model's config.json)"),
        (
            (Settle("written_by", "peft==0.19.0", "unpatched"), Settle("orientation", when="otherwise")),
            "--written-by peft==0.19.0 if that was not called before, else --orientation",
        ),
    ],
)
def test_what_settles_a_conclusion_in_words(settle, remedy):
    assert Conclusion(None, "none", (Evidence("no_version"),), settle).remedy == remedy


def test_one_and_several_are_told_apart():
    assert "no LoRA on layer 1, " in str(Finding("missing_layers", "a", None, {"layers": [1]}))
    assert "no LoRA on layers 1, 2, " in str(Finding("missing_layers", "a", None, {"layers": [1, 2]}))
    far = {"experts": [3], "count": 1, "of": 8, "ratios": [100.0]}
    assert str(Finding("far_experts", "a", None, far)).endswith("in norm: 3, 100 times it")
