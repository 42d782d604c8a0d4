"""README's support table is made from tox.ini and the release table. `python tests/test_docs.py` renews it."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from peft_moe_compat import releases

ROOT = Path(__file__).parent.parent
START, END = "<!-- support table -->\n", "<!-- end of support table -->"


def matrix() -> list[tuple[str, str, str]]:
    """(PEFT version, transformers version, torch version) of every matrix environment in tox.ini."""
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    pins = dict(re.findall(r"^([\w!-]+): \w+==([\d.]+)$", tox["testenv"]["deps"], re.MULTILINE))
    (default,) = (version for factor, version in pins.items() if factor.startswith("!torch"))
    names = re.findall(r"^(peft\d+)-(tf\d+)-?(torch\d+)?$", tox["tox"]["env_list"], re.MULTILINE)
    return [(pins[peft], pins[transformers], pins.get(torch, default)) for peft, transformers, torch in names]


def support_table() -> str:
    rows = [
        "| PEFT | tested with transformers | and torch | `(E, out, in)` weights | `(E, in, out)` weights |",
        "|---|---|---|---|---|",
    ]
    by_peft: dict[tuple[str, str], list[str]] = {}
    for peft, transformers, torch in matrix():
        by_peft.setdefault((peft, torch), []).append(transformers)
    for (peft, torch), transformers in by_peft.items():
        rule = releases.release_for(peft)
        cells = (peft, ", ".join(transformers), torch, rule.orientation(False), rule.orientation(True))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def test_readme_has_the_table_of_this_matrix():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0] == support_table()


def test_the_matrix_covers_the_table_and_ends_with_the_newest():
    tested = [peft for peft, _, _ in matrix()]
    assert tested == sorted(tested, key=releases.parse_version)
    assert releases.parse_version(tested[-1]) == releases.NEWEST_TESTED
    assert {str(rule.since) for rule in releases.RULES} <= set(tested)


def test_constraints_pin_the_newest_pair():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for package, version in zip(("peft", "transformers", "torch"), matrix()[-1], strict=True):
        assert f"{package}=={version}\n" in constraints


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
