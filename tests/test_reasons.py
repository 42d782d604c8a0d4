"""Reasons are codes with their data; every code has its sentence, and every sentence its code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import peft_moe_compat
from peft_moe_compat.reasons import SENTENCES, Reason, because


def test_every_code_has_its_sentence_and_every_sentence_its_code():
    given: dict[str, set[int]] = {}
    for file in Path(peft_moe_compat.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "because":
                codes = [n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)]
                assert codes, ast.unparse(node)
                for code in codes:
                    given.setdefault(code, set()).add(len(node.args) - 1)
    assert given.keys() == SENTENCES.keys()
    fields = {code: len(set(re.findall(r"{(\d)", sentence))) for code, sentence in SENTENCES.items()}
    assert {code: {count} for code, count in fields.items()} == given


def test_a_reason_may_be_about_another():
    inner = because("trained", "down_proj")
    assert str(because("no_kernels", inner)) == "no fused kernels: down_proj is trained too"
    assert inner == Reason("trained", ("down_proj",))
    assert hash(inner) == hash(because("trained", "down_proj"))
