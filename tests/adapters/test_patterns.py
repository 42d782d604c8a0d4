"""Patterns and targets of a config: what PEFT finds for them, and no pattern that takes forever."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from support.limits import seconds

from peft_moe_compat.adapters.patterns import Expression, Patterns
from peft_moe_compat.adapters.targets import Targets
from peft_moe_compat.errors import AdapterFileError

KEYS = [f"model.layers.{i}.mlp.experts.{e}.{n}_proj" for i in range(48) for e in range(128) for n in ("gate", "down")]

_ATOMS = r"a b . \. [ab] [^a] \w \d [0-9] $ ^ \b x _ (?=a) (?!b) \s \W [a-c\d] é [\W_]".split()  # noqa: SIM905
_REPEATED = ["a", "b", ".", "[ab]", "(?:ab)", "(a.)", r"\w"]
_COUNTS = ["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}", "??", "{2,}"]
_EXPRESSIONS = st.recursive(
    st.sampled_from(_ATOMS) | st.builds(str.__add__, st.sampled_from(_REPEATED), st.sampled_from(_COUNTS)),
    lambda inner: (
        st.lists(inner, max_size=4).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
        | inner.map(lambda part: f"(?:{part})?")
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_EXPRESSIONS, max_size=4), st.lists(st.text("ab.x1_é ", min_size=1, max_size=8), min_size=1))
def test_what_is_found_is_what_peft_finds(expressions: list[str], keys: list[str]) -> None:
    try:
        patterns, whole = Patterns(dict.fromkeys(expressions, 1)), [Expression(one) for one in expressions]
    except AdapterFileError:
        return
    for key in keys:
        found = patterns.find(key)
        assert (key if found is None else found) == get_pattern_key(expressions, key)
        assert [one.matches(key) for one in whole] == [re.fullmatch(one, key) is not None for one in expressions]


def test_a_dot_is_any_character_and_the_first_pattern_wins() -> None:
    table = ["bXexperts", "a.experts", r"a\.experts", "experts", r"b\.[0-9]+\.up", "b.1.up", ".experts"]
    keys = [
        "a.experts",
        "q.a.experts",
        "aXexperts",
        "q.bXexperts",
        "b.12.up",
        "b.1.up",
        "xb.1.up",
        "q.b.1xup",
        "zexperts",
    ]
    patterns = Patterns(dict.fromkeys(table))
    assert [patterns.find(key) or key for key in keys] == [get_pattern_key(table, key) for key in keys]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(a+)+b", "repeats what holds max_repeat"),
        ("(a|aa)*b", "repeats what holds branch"),
        ("(a?){30}a", "repeats what holds max_repeat"),
        ("a?" * 30 + "a" * 30, "ways to match"),
        ("(a|ab)" * 30, "ways to match"),
        (".*.*.*.*.*x", "repetitions in a row"),
        (r"(a)\1", "holds groupref"),
        ("(?i)a", "with flags"),
        ("(" * 3000 + ")" * 3000, "groups"),
        ("(" * 90 + "a" + ")*" * 90, "repeats what holds"),
        ("a" * 60_000 + "*", "characters"),
        ("a)|(b", "no regular expression"),
        ("a{99999999999}", "no regular expression"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("where", [lambda one: Patterns({one: 1}), Expression], ids=["patterns", "targets"])
def test_an_expression_that_may_take_forever_is_refused_by_name(
    where: Callable[[str], object], pattern: str, why: str
) -> None:
    begin = time.process_time()
    with pytest.raises(AdapterFileError, match=why) as caught:
        where(pattern)
    assert repr(pattern)[1:10] in str(caught.value)
    assert time.process_time() - begin < seconds(1)


_RANDOM = random.Random(0)


def _dotted(length: int) -> str:
    return "".join(_RANDOM.choice(".a") for _ in range(length))


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        ([f".*a{i}" for i in range(20_000)], KEYS),
        ([f"x*a{i}" for i in range(20_000)], KEYS),
        ([_dotted(60) for _ in range(50_000)], [_dotted(500) for _ in range(30_000)]),
        ([_dotted(12) + "x*" for _ in range(20_000)], [_dotted(500) for _ in range(30_000)]),
        ([f"({_dotted(8)})x?y?z?" for _ in range(9_000)], [_dotted(500) for _ in range(30_000)]),
        ([f"[{'a-b' * 6_000}]*"], [_dotted(500) for _ in range(30_000)]),
        (["a"], ["a" * 10**7]),
    ],
    ids=["any", "repeated", "dots", "beginnings", "branches", "class", "a long name"],
)
def test_too_much_work_is_refused(table: list[str], keys: list[str]) -> None:
    begin = time.process_time()
    with pytest.raises(AdapterFileError, match=r"too many steps|Replace them|is no name"):
        list(map(Patterns(dict.fromkeys(table, 1)).find, keys))
    assert time.process_time() - begin < seconds(5)


@pytest.mark.parametrize(
    "table",
    [KEYS, [rf"model.layers.{i}.mlp.experts\.[0-9]+\.{n}_proj" for i in range(48) for n in ("gate", "up", "down")]],
    ids=["a name for every linear", "an expression for every layer"],
)
def test_what_people_write_is_fast(table: list[str]) -> None:
    begin = time.process_time()
    patterns = Patterns(dict.fromkeys(table, 1))
    assert all(map(patterns.find, KEYS))
    assert time.process_time() - begin < seconds(4)


def test_unsloths_and_ms_swifts_expressions_are_taken() -> None:
    names = "(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    unsloth = (
        rf"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?{names}.*?)|"
        rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:{names}))"
    )
    swift = r"^(model\.language_model(?=\.).*\.(gate_proj|down_proj|q_proj))$"
    keys = ["model.layers.3.mlp.gate_proj", "model.language_model.layers.1.mlp.down_proj", "model.visual.q", "lm_head"]
    for expression in (unsloth, swift):
        found = [Expression(expression).matches(key) for key in keys]
        assert found == [re.fullmatch(expression, key) is not None for key in keys]
        assert any(found)


_PATHS = st.lists(st.sampled_from(["a", "b", "experts"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(_PATHS, max_size=6), _PATHS)
def test_targets_are_matched_by_suffix(entries: list[str], path: str) -> None:
    def reaches(target: str) -> bool:
        module = target.rpartition(".")[0]
        return bool(module) and (f".{path}".endswith(f".{module}") or f".{module}".endswith(f".{path}"))

    targets, fitting = Targets(entries), [target for target in entries if reaches(target)]
    assert targets.matrix(path) == (fitting[0] if fitting else None)
    for bare in (False, True):
        named = [target for target in entries if reaches(target) or (bare and "." not in target)]
        expected = dict.fromkeys(target.rpartition(".")[2] for target in named)
        assert targets.parameters(path, bare=bare) == tuple(expected)
    assert targets.reach(path) == any(f".{path}".endswith(f".{target}") for target in entries)


def test_targets_by_their_full_names_take_no_longer_the_more_there_are() -> None:
    begin = time.process_time()
    paths = [f"model.layers.{i}.mlp.experts" for i in range(20_000)]
    targets = Targets(f"{path}.{name}" for path in paths for name in ("gate_up_proj", "down_proj"))
    assert all(targets.parameters(path) == ("gate_up_proj", "down_proj") for path in paths)
    assert all(targets.reach(f"{path}.down_proj") for path in paths)
    assert time.process_time() - begin < seconds(4)


def test_more_parameters_than_a_module_has_are_refused() -> None:
    with pytest.raises(AdapterFileError, match=r"targets 200 parameters of 'experts'"):
        Targets(f"experts.p{i}" for i in range(200))
