"""Reasons and remedies are values; their sentences stand in one table, and none is without a reason that it is for."""

from __future__ import annotations

import ast
from pathlib import Path
from string import Formatter

import pytest

import peft_moe_compat.adapters
from peft_moe_compat.adapters.conclusions import SENTENCES, Conclusion, Reason, Settle

ROOM = Path(peft_moe_compat.adapters.__file__).parent


def reasons():
    """(code, names of its details) of every `Reason(...)` in adapters; None where they are no dict display."""
    for file in sorted(ROOM.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Reason":
                code, *detail = (ast.literal_eval(a) if isinstance(a, ast.Constant) else a for a in node.args)
                keys = detail[0].keys if detail and isinstance(detail[0], ast.Dict) else None if detail else []
                yield code, None if keys is None else {key.value for key in keys}


def test_every_reason_has_its_sentence_and_every_sentence_its_reason():
    found = list(reasons())
    assert {code for code, _ in found} == set(SENTENCES)
    checked = 0
    for code, given in found:
        if given is not None:
            assert given == {name for _, name, _, _ in Formatter().parse(SENTENCES[code]) if name}, code
            checked += 1
    assert checked > 30


def test_a_reason_about_a_reason_is_one_sentence():
    shapes = Reason("shapes", {"count": 2})
    assert str(Reason("fit_alone", {"what": shapes, "orientation": "linear"})) == "shapes of 2 modules fit linear alone"


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
    assert Conclusion(None, "none", (Reason("no_version"),), settle).remedy == remedy
