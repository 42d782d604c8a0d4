"""README's support table is made from tox.ini and the release table. `python tests/test_docs.py` renews it."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from peft_moe_compat import releases

ROOT = Path(__file__).parent.parent
START, END = "<!-- support table -->\n", "<!-- end of support table -->"


def pairs() -> list[tuple[str, str]]:
    """(PEFT version, transformers version) of every matrix environment in tox.ini."""
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    pins = dict(re.findall(r"^(\w+): \w+==([\d.]+)$", tox["testenv"]["deps"], re.MULTILINE))
    names = re.findall(r"^(peft\d+)-(tf\d+)$", tox["tox"]["env_list"], re.MULTILINE)
    return [(pins[peft], pins[transformers]) for peft, transformers in names]


def support_table() -> str:
    rows = [
        "| PEFT | tested with transformers | `(E, out, in)` weights | `(E, in, out)` weights |",
        "|---|---|---|---|",
    ]
    by_peft: dict[str, list[str]] = {}
    for peft, transformers in pairs():
        by_peft.setdefault(peft, []).append(transformers)
    for peft, transformers in by_peft.items():
        rule = releases.release_for(peft)
        cells = (peft, ", ".join(transformers), rule.orientation(False), rule.orientation(True))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def test_readme_has_the_table_of_this_matrix():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0] == support_table()


def test_the_matrix_covers_the_table_and_ends_with_the_newest():
    tested = [peft for peft, _ in pairs()]
    assert tested == sorted(tested, key=releases.parse_version)
    assert releases.parse_version(tested[-1]) == releases.NEWEST_TESTED
    assert {str(rule.since) for rule in releases.RULES} <= set(tested)


def test_constraints_pin_the_newest_pair():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    peft, transformers = pairs()[-1]
    assert f"peft=={peft}\n" in constraints
    assert f"transformers=={transformers}\n" in constraints


def test_every_test_and_result_the_engines_table_names_exists():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- engines -->")[2]
    names = re.findall(r"`([^`]+)`", table.partition("<!-- end of engines -->")[0])
    tests = [name.split("::") for name in names if "::" in name]
    assert len(tests) > 15
    for file, test in tests:
        assert f"def {test}(" in (ROOT / "tests" / "scale" / file).read_text(encoding="utf-8"), test
    results = [name for name in names if name.endswith((".txt", ".json"))]
    assert results
    for name in results:
        assert (ROOT / "benchmarks" / "results" / name).exists(), name


def main() -> None:
    path = ROOT / "README.md"
    head, _, rest = path.read_text(encoding="utf-8").partition(START)
    tail = rest.partition(END)[2]
    path.write_text(head + START + support_table() + END + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
