"""What the documents say is so: tables, links, options, names, and the code they show.

README's support table is made from tox.ini and the release table. `python tests/test_docs.py` renews it.
"""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from peft import PeftModel
from support import zoo
from transformers import AutoModelForCausalLM

import peft_moe_compat
from peft_moe_compat import releases
from peft_moe_compat.cli.main import app

ROOT = Path(__file__).parent.parent
START, END = "<!-- support table -->\n", "<!-- end of support table -->"
# What a reader meets; the changelog and the benchmarks' tables are longer and wider.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_LINKS = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
HUB_ID = "Qwen/Qwen3-30B-A3B"


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


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_spans(text: str) -> list[str]:
    """Inline code, each on one line, and the lines of fenced bash blocks without their comments."""
    fences = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line.partition(" #")[0] for block in fences for line in block.splitlines()]
    return [" ".join(code.split()) for code in spans + lines]


def spans_of_all_pages() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for code in code_spans(read(page)):
            yield page.name, code


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_has_the_table_of_this_matrix():
    assert read(ROOT / "README.md").partition(START)[2].partition(END)[0] == support_table()


def test_the_matrix_covers_the_table_and_ends_with_the_newest():
    tested = [peft for peft, _, _ in matrix()]
    assert tested == sorted(tested, key=releases.parse_version)
    assert releases.parse_version(tested[-1]) == releases.NEWEST_TESTED
    assert max(releases.parse_version(beside) for _, beside, _ in matrix()) == releases.NEWEST_TRANSFORMERS
    assert {str(rule.since) for rule in releases.RULES} <= set(tested)


def test_constraints_pin_the_newest_pair():
    constraints = read(ROOT / "constraints.txt")
    for package, version in zip(("peft", "transformers", "torch"), matrix()[-1], strict=True):
        assert f"{package}=={version}\n" in constraints


def test_ci_runs_the_command_of_the_readme():
    command = "pip install tox && tox -p 2"
    assert command in code_spans(read(ROOT / "README.md"))
    run = read(ROOT / ".ci" / "run")
    limit = r"timeout .* \d+m "
    assert f"\n{command} |" in re.sub(limit, "", run)
    newest = re.search(r"^newest=(\S+)$", run, re.MULTILINE)[1]
    parts = ",".join(re.findall(r'^TOXENV\+?="(.+)"$', run, re.MULTILINE)).replace("$newest", newest)
    listed = read(ROOT / "tox.ini").partition("env_list =")[2].partition("skip_missing")[0].partition("#")[0].split()
    light = [f"py{version}-light" for version in ("310", "311", "312", "313")]
    assert sorted(filter(None, parts.split(","))) == sorted([*light, *(name for name in listed if "{" not in name)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short(page):
    lines = read(page).splitlines()
    assert len(lines) < (160 if page.parent == ROOT else 121)
    assert [line for line in lines if len(line) > 120] == []


def test_links_lead_somewhere():
    seen = 0
    for page in WITH_LINKS:
        for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(read(path)), f"{page.name}: {target}"
            seen += 1
    assert seen > 40


def test_the_readme_leads_to_every_page_and_example():
    targets = set(re.findall(r"\]\(([^)\s#]+)", read(ROOT / "README.md")))
    wanted = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py"), ROOT / "CONTRIBUTING.md"]
    assert len(wanted) > 10
    assert {path.relative_to(ROOT).as_posix() for path in wanted} <= targets


def test_every_test_that_is_named_exists():
    found = {path.name: read(path) for path in (ROOT / "tests").rglob("test_*.py")}
    names = {code for _, code in spans_of_all_pages() if "::" in code}
    assert len(names) > 25
    for name in names:
        file, test = name.split("::")
        assert f"def {test}(" in found[Path(file).name], name


def test_every_file_that_is_named_exists():
    root = r"(?:peft_moe_compat|tests|docs|examples|benchmarks)"
    named = {
        code.partition("::")[0] for _, code in spans_of_all_pages() if re.fullmatch(rf"{root}/[\w./-]+(::\w+)?", code)
    }
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_estimate_is_what_its_script_prints_and_near_what_an_h100_took():
    spec = importlib.util.spec_from_file_location("estimate", ROOT / "benchmarks" / "estimate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.table() in read(ROOT / "docs" / "performance.md")
    results = read(ROOT / "benchmarks" / "results" / "peers_h100.txt")
    for layer in script.LAYERS.values():
        took = float(re.search(rf"^{layer.name} ours .'fwd\+bwd ms': ([\d.]+)", results, re.MULTILINE)[1])
        assert abs(script.estimate(layer, script.CARDS["H100 SXM"]) / took - 1) < 0.1


def test_every_result_that_the_engines_name_exists():
    engines = read(ROOT / "docs" / "engines.md")
    results = {code for code in code_spans(engines) if code.endswith((".txt", ".json"))}
    assert len(results) > 4
    assert [name for name in sorted(results) if not (ROOT / "benchmarks" / "results" / name).exists()] == []


def test_the_engines_table_and_its_sections_are_the_same():
    text = read(ROOT / "docs" / "engines.md").partition("<!-- engines -->")[2]
    rows = re.findall(r"^\| \[.+?\]\(#([\w-]+)\)", text, re.MULTILINE)
    sections = text.split("\n## ")[1:]
    assert rows == [next(iter(anchors(f"# {section.splitlines()[0]}"))) for section in sections]
    for section in sections:
        assert re.search(r"`test_\w+\.py::test_\w+`", section), section


def options() -> dict[str, set[str]]:
    """Command -> its options, as `--help` shows them."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {opt for param in command.params for opt in (*param.opts, *param.secondary_opts) if opt.startswith("--")}
        for name, command in commands.items()
    }


def test_every_command_and_option_that_is_named_exists():
    known = options()
    named = set()
    for page, code in spans_of_all_pages():
        for line in code.split("&&"):
            asked = re.findall(r"--[a-z][\w-]*", line)
            if command := re.match(r"\s*(?:peft-moe-compat )([a-z]+)", line) or re.match(r"(convert) --", line):
                assert set(asked) <= known[command[1]], f"{page}: {line}"
                named.add(command[1])
            elif line.startswith("--"):
                assert set(asked) <= set().union(*known.values()), f"{page}: {line}"
    assert named == set(known)


def python_blocks() -> list[tuple[str, str]]:
    return [
        (page.name, textwrap.dedent(block))
        for page in PAGES
        for block in re.findall(r"^```python\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)
    ] + [("docstring", block) for block in docstring_blocks()]


def docstring_blocks() -> list[str]:
    """The indented parts of the package's docstring, in order."""
    blocks = re.findall(r"(?:^    .*\n|(?<=\n)\n(?=    ))+", peft_moe_compat.__doc__ or "", re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def test_code_blocks_compile_and_use_public_names_alone():
    used = set()
    for where, block in python_blocks():
        for node in ast.walk(ast.parse(block, where)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "peft_moe_compat":
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_moe_compat"):
                assert node.module == "peft_moe_compat", where
                used.update(alias.name for alias in node.names)
    assert len(used) > 7
    assert used <= set(peft_moe_compat.__all__)


def test_names_said_of_the_package_in_passing_are_public():
    said = {name for _, code in spans_of_all_pages() for name in re.findall(r"\bpeft_moe_compat\.(\w+)(?=\()", code)}
    assert said
    assert said <= set(peft_moe_compat.__all__)


def test_every_public_name_is_explained_somewhere():
    said = {word for _, code in spans_of_all_pages() for word in re.findall(r"\w+", code)}
    assert set(peft_moe_compat.__all__) - {"__version__"} - said == set()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Runs code of the documents in an empty folder, on a tiny model in place of theirs; returns its names."""
    base = zoo.tiny_model(zoo.FAMILIES[0])
    base.save_pretrained(tmp_path / "base")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def from_pretrained(name, **kwargs):
        assert name == str(tmp_path / "base")
        fresh = zoo.tiny_model(zoo.FAMILIES[0])
        fresh.load_state_dict(state)
        return fresh

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)

    def run(code):
        names = {"tokens": zoo.token_ids()}
        exec(compile(code.replace(HUB_ID, str(tmp_path / "base")), "documents", "exec"), names)
        return names

    return run


def test_the_script_of_the_readme_runs(tiny):
    (block,) = [block for page, block in python_blocks() if page == "README.md"]
    model = tiny(block)["model"]
    assert isinstance(model, PeftModel)
    assert len(zoo.wrappers(model)) == 2 * 2  # parameters, layers


def test_the_docstring_tells_a_life_that_runs(tiny, tmp_path):
    assert (peft_moe_compat.__doc__ or "").count("\n") < 60
    blocks = docstring_blocks()
    assert len(blocks) == 6
    names = tiny("".join(blocks))
    assert names["same"].same
    assert names["right"]
    assert (tmp_path / "for-vllm" / "adapter_model.safetensors").exists()
    assert names["model"](input_ids=names["tokens"]).logits.isfinite().all()


def defined_in(path: Path) -> set[str]:
    """The names that the statements of a module define."""
    found = set()
    for node in ast.parse(read(path)).body if path.exists() else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found.update(ast.unparse(target) for target in getattr(node, "targets", None) or [node.target])
    return found


def test_every_place_that_contributing_names_exists():
    """`file.py`: `NAME`, `NAME`"""
    text = read(ROOT / "CONTRIBUTING.md")
    places = re.findall(r"`((?:peft_moe_compat|tests)/[\w/]+\.py)`:((?:,?\s+`\w+`)+)", text)
    named = {(file, name) for file, names in places for name in re.findall(r"\w+", names)}
    assert len(named) > 15
    assert [(file, name) for file, name in sorted(named) if name not in defined_in(ROOT / file)] == []


def main() -> None:
    path = ROOT / "README.md"
    head, _, rest = read(path).partition(START)
    path.write_text(head + START + support_table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
