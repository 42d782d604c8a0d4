"""The commands on adapter files: what they print, their JSON and exit codes; a conversion killed, and one measured."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.adapter_files import QWEN, Spec, read_adapter, save, save_fused, save_per_expert, save_stacked
from typer.testing import CliRunner

import peft_moe_compat.adapters
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.cli.main import app

FIXTURES = Path(__file__).parent.parent / "fixtures"
SPEC = Spec(attention=True)
TO = "peft==0.18.1,transformers==5.0.0"


@pytest.fixture
def files(tmp_path):
    """An adapter and its base model's config, and a folder to write into."""
    save_fused(tmp_path / "in", SPEC, SPEC.factors(("gate_up", "down")), peft_version="0.21.2")
    (tmp_path / "config.json").write_text(json.dumps(SPEC.model()))
    return tmp_path


def run(*arguments, columns: int = 200):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns)})


def test_the_version_and_the_module():
    assert run("--version").output == f"peft-moe-compat {peft_moe_compat.__version__}\n"
    command = [sys.executable, "-m", "peft_moe_compat", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"peft-moe-compat {peft_moe_compat.__version__}\n"


def test_inspect_shows_what_it_found(files):
    result = run("inspect", files / "in", "--model", files / "config.json")
    assert result.exit_code == 0, result.output
    for text in ("PEFT 0.21.2", "linear", "rank_major", "gate_up_proj,down_proj", "qwen3_moe", "SGLang", "llama.cpp"):
        assert text in result.output


def test_releases_of_which_the_same_is_to_be_said_share_a_row(files):
    shown = run("inspect", files / "in", "--model", files / "config.json").output
    (row,) = [line for line in shown.splitlines() if "vLLM >=" in line]
    assert ", <" not in row
    assert "--to vllm --model" in row
    assert sum("PEFT >=" in line for line in shown.splitlines()) == 3  # the layouts differ, and what converts to them
    factors = SPEC.factors(("gate", "up", "down"))
    save_per_expert(files / "single", SPEC, factors, use_rslora=True)  # which vLLM ignores before 0.30
    shown = run("inspect", files / "single", "--model", files / "config.json").output
    assert [line.split("│")[1].strip() for line in shown.splitlines() if "vLLM >=" in line] == [
        "vLLM >= 0.28, < 0.30",
        "vLLM >= 0.30",
    ]


def test_help_fits_a_narrow_terminal():
    for command in ("inspect", "convert", "merge", "verify"):
        assert "…" not in run(command, "--help", columns=80).output


def test_inspect_shows_what_the_numbers_show_a_row_for_modules_alike(files):
    assert "nothing out of the ordinary" in run("inspect", files / "in", "--model", files / "config.json").output
    factors = SPEC.factors(("gate_up", "down"))
    for (_, role), (_, B) in factors.items():
        if role == "down":
            B[1:] = 0
    save_fused(files / "lost", SPEC, factors, peft_version="0.21.2")
    shown = run("inspect", files / "lost", "--model", files / "config.json").output
    assert "lora_B of 3 of 4 experts is zero" in shown
    assert "model.layers.0.mlp.experts and 1 more" in shown.partition("What the numbers show")[2]
    shown = run("inspect", files / "lost", "--model", files / "config.json", "--no-content").output
    assert "lora_B of 3 of 4 experts" not in shown


def test_convert_then_verify(files):
    model = ("--model", files / "config.json")
    result = run("convert", files / "in", files / "out", "--to", TO, *model)
    assert result.exit_code == 0, result.output
    assert "every factor is kept bit for bit" in result.output
    result = run("verify", files / "in", files / "out", *model)
    assert result.exit_code == 0, result.output
    assert "the same" in result.output
    document = json.loads(run("verify", files / "in", files / "out", *model, "--json").stdout)
    assert (document["same"], document["worst"]) == (True, 0.0)
    other = Spec(attention=True, seed=5)
    save_fused(files / "other", other, other.factors(("gate_up", "down")), peft_version="0.21.2")
    result = run("verify", files / "in", files / "other", *model)
    assert result.exit_code == 1
    assert "not the same" in result.output
    assert json.loads(run("verify", files / "in", files / "other", *model, "--json").stdout)["same"] is False
    result = run("verify", files / "in", files / "other", *model, "--json", "--tolerance", "10")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tolerance"] == 10


def test_what_cannot_be_compared_is_null_in_json(files):
    one = Spec(attention=True)
    save_fused(files / "down", one, one.factors(("down",)), peft_version="0.21.2")
    result = run("verify", files / "down", files / "in", "--model", files / "config.json", "--json")
    assert result.exit_code == 1

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(result.stdout, parse_constant=refuse)
    assert (document["same"], document["worst"]) == (False, None)
    factors = SPEC.factors(("gate_up", "down"))
    next(iter(factors.values()))[0][0, 0, 0] = torch.nan
    save_fused(files / "nan", SPEC, factors, peft_version="0.21.2")
    result = run("verify", files / "nan", files / "nan", "--model", files / "config.json", "--json")
    document = json.loads(result.stdout, parse_constant=refuse)
    assert (document["same"], document["worst"]) == (False, None)
    assert None in [row["max_difference"] for row in document["rows"]]
    assert None in [row["relative_difference"] for row in document["rows"]]


def test_merge_then_verify(files):
    stem = "model.layers.{}.{}"
    weights = {stem.format(i, "self_attn.q_proj.weight"): torch.randn(SPEC.H, SPEC.H) for i in SPEC.layers}
    for i in SPEC.layers:
        weights[stem.format(i, "mlp.experts.gate_up_proj")] = torch.randn(SPEC.E, 2 * SPEC.I, SPEC.H)
        weights[stem.format(i, "mlp.experts.down_proj")] = torch.randn(SPEC.E, SPEC.H, SPEC.I)
    base = files / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(SPEC.model()))
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, base / "model.safetensors")
    result = run("merge", base, files / "in", files / "merged")
    assert result.exit_code == 0, result.output
    for text in ("bfloat16", "gate_up_proj", "down_proj", "q_proj", "and 1 more", "written"):
        assert text in result.output
    assert run("merge", base, files / "in", files / "merged").exit_code == 2
    document = json.loads(run("merge", base, files / "in", files / "again", "--json").stdout)
    assert [row["format"] for row in document["rows"]] == ["bfloat16"] * 6
    result = run("verify", files / "in", files / "merged", "--base", base)
    assert result.exit_code == 0, result.output
    assert "merged as it should be" in result.output
    result = run("verify", files / "in", base, "--base", base)
    assert result.exit_code == 1
    assert "not merged" in result.output
    assert "The adapter is in none of the weights" in result.output
    assert json.loads(run("verify", files / "in", base, "--base", base, "--json").stdout)["same"] is False


def test_convert_json(files):
    result = run("convert", files / "in", files / "out", "--to", "sglang", "--model", files / "config.json", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["exactness"] == "bits"
    assert (document["target"], document["out"]) == ("sglang", str(files / "out"))


@pytest.mark.parametrize("command", [("inspect",), ("convert", "OUT"), ("verify", "OUT"), ("merge", "A", "B")])
def test_errors_have_exit_code_2_and_a_json_form(tmp_path, command):
    name, *rest = command
    result = run(name, tmp_path / "nothing", *(str(tmp_path / part) for part in rest))
    assert result.exit_code == 2
    assert "error:" in result.stderr
    result = run(name, tmp_path / "nothing", *(str(tmp_path / part) for part in rest), "--json")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert set(document) == {"error", "message"}
    assert document["error"].endswith("Error")


def test_wrong_flags_have_exit_code_2(files):
    for more in (["--to", "nobody"], ["--to", "peft==0.16.0"], ["--written-by", "me"], ["--packing", "loose"]):
        assert run("convert", files / "in", files / "out", *more).exit_code == 2
    assert run("verify", files / "in").exit_code == 2
    assert not (files / "out").exists()


@pytest.mark.parametrize("columns", [1, 20, 60, 400])
def test_any_terminal_will_do(files, columns):
    model = ("--model", files / "config.json")
    assert run("inspect", files / "in", *model, columns=columns).exit_code == 0
    assert run("convert", files / "in", files / "out", "--to", TO, *model, columns=columns).exit_code == 0
    assert run("verify", files / "in", files / "out", *model, columns=columns).exit_code == 0
    assert run("inspect", files / "nothing", columns=columns).exit_code == 2


def test_markup_in_names_is_shown_as_it_is(tmp_path):
    factors = SPEC.factors(("gate_up", "down"))
    extra = {"base_model.model.[red]odd[/red].weight": torch.ones(2)}
    source = save_fused(tmp_path / "[bold]in[/]", SPEC, factors, extra=extra, peft_version="0.21.2")
    result = run("inspect", source, columns=400)
    assert result.exit_code == 0, result.output
    assert "[bold]in[/]" in result.output
    changed = save_fused(
        tmp_path / "b", SPEC, factors, extra={name: t + 1 for name, t in extra.items()}, peft_version="0.21.2"
    )
    result = run("verify", source, changed, columns=400)
    assert result.exit_code == 1
    assert "[red]odd[/red]" in result.output
    result = run("inspect", tmp_path / "[red]nothing[/red]", columns=400)
    assert result.exit_code == 2
    assert "[red]nothing[/red]" in result.stderr


TEXT, COUNT = (str, type(None)), (int, type(None))
CONCLUSION = {"value": TEXT, "confidence": {"certain", "stated", "likely", "none"}, "evidence": [str], "settle": str}
NUMBERS = {"rank": COUNT, "scaling": (float, int, type(None)), "in_features": COUNT, "out_features": COUNT}
MODULE = {"path": str, "form": {"fused", "per_expert", "stacked"}, "num_experts": COUNT}
LEVELS = {"error", "warning", "note"}
FINDING = {"code": str, "path": str, "projection": TEXT, "detail": dict, "level": LEVELS, "text": str}
# Whoever changes this changes what scripts read: it counts in SCHEMA_VERSION and has a line in the changelog.
INSPECTION = {
    "schema_version": {1},
    "path": str,
    "files": [str],
    "num_tensors": int,
    "total_bytes": int,
    "dtypes": [str],
    "form": {"fused", "per_expert", "stacked", "none"},
    "model_type": TEXT,
    **dict.fromkeys(("writer", "orientation", "packing", "nesting"), CONCLUSION),
    "modules": [{**MODULE, "projections": [{"name": TEXT, **NUMBERS}]}],
    "other_tensors": int,
    "other_bytes": int,
    "readers": dict,
    "transformers": TEXT,
    "content": [FINDING],
    "notes": [str],
    "undecided": [{"orientation", "packing", "nesting"}],
}


def assert_form(value, form, where="$"):
    if isinstance(form, dict):
        assert value.keys() == form.keys(), where
        for key in form:
            assert_form(value[key], form[key], f"{where}.{key}")
    elif isinstance(form, list):
        assert isinstance(value, list), where
        for item in value:
            assert_form(item, form[0], f"{where}[]")
    else:
        assert value in form if isinstance(form, set) else isinstance(value, form), (where, value)


def assert_inspection(document):
    assert_form(document, INSPECTION)
    assert len(document["readers"]) > 3
    for verdict in document["readers"].values():
        assert_form(verdict, {"verdict": {"reads", "wrong", "fails", "unknown"}, "why": str})
    for name in ("writer", "orientation", "packing", "nesting"):
        said = document[name]
        assert said["evidence"], name
        if said["value"] is None:
            assert (said["confidence"], bool(said["settle"])) == ("none", True), name
        assert (name in document["undecided"]) == (said["value"] is None and name != "writer"), name


def test_inspections_of_every_form_have_one_json_form(files):
    fused, linears = SPEC.factors(("gate_up", "down")), SPEC.factors(("gate", "up", "down"))
    per_expert = save_per_expert(files / "per", SPEC, linears, skip=[(1, "up")])
    stacked = save_stacked(files / "stacked", SPEC, fused)
    none = save(files / "none", {"base_model.model.lm_head.weight": torch.ones(2)}, {"r": 2, "lora_alpha": 2})
    square = Spec(I=8)
    open_ = save_fused(files / "open", square, square.factors(("down",)))
    for source in (files / "in", per_expert, stacked, none, open_):
        for more in ((), ("--model", str(files / "config.json"))):
            if source is open_ and more:
                continue
            result = run("inspect", source, "--json", *more)
            assert result.exit_code == 0, result.output
            assert_inspection(json.loads(result.stdout))


def test_inspections_of_the_fixtures_have_that_form_too():
    cases = sorted(FIXTURES.rglob("truth.json"))[::5]
    assert len(cases) > 40
    for file in cases:
        model = file.parent / "base_config.json"
        assert_inspection(json.loads(inspect_adapter(file.parent, model=model).to_json()))


BIG = Spec(E=16, H=512, I=256, r=16, layers=tuple(range(30)))
# VmHWM, not ru_maxrss: that one starts at the parent's own size, across fork and exec, and so may never rise.
CONVERT = """
import json, sys
import torch
torch.set_num_threads(1)
import peft_moe_compat.adapters.convert as c
def high():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        return 0
before = high()
c.convert_adapter(sys.argv[1], sys.argv[2], to=sys.argv[3], model=json.loads(sys.argv[4]),
                  progress=lambda done, total: print(done, total, flush=True))
print("peak", (high() - before) // 1024, flush=True)
"""


def big_adapter(folder: Path, layers: int) -> Path:
    """One layer's tensors again and again, each written by itself."""
    spec = Spec(E=BIG.E, H=BIG.H, I=BIG.I, r=BIG.r, layers=(0,))
    source = save_fused(folder / "in", spec, spec.factors(("gate_up", "down")), peft_version="0.21.2")
    from safetensors.torch import load_file

    one = load_file(source / "adapter_model.safetensors")
    every = {n.replace("layers.0.", f"layers.{i}."): t.clone() for i in range(layers) for n, t in one.items()}
    save_file(every, source / "adapter_model.safetensors", {"format": "pt"})
    return source


def child(source: Path, out: Path, to: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CONVERT, str(source), str(out), to, json.dumps(BIG.model())]
    paths = os.pathsep.join([str(Path(peft_moe_compat.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PEFT_MOE_COMPAT": "0"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("to", [TO, "per-expert"])
def test_killed_half_way_there_is_no_output_and_the_input_is_whole(tmp_path, to):
    source = big_adapter(tmp_path, 30)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    process = child(source, tmp_path / "out", to)
    for line in process.stdout:
        done, total = map(int, line.split())
        if done * 3 > total:
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    left = [path.name for path in tmp_path.iterdir() if path.name != "in"]
    assert all(re.fullmatch(r"\.peft-moe-compat-[\w.]+-[0-9a-f]{8}\.tmp", name) for name in left), left
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    process = child(source, tmp_path / "out", to)
    process.communicate()
    assert process.returncode == 0
    how = {"orientation": "reversed", "nesting": QWEN.parameters} if to == TO else {}
    found = read_adapter(tmp_path / "out", QWEN, BIG.E, **how).experts
    assert len({layer for layer, _ in found}) == 30


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("to", [TO, "per-expert"])
def test_memory_stays_that_of_a_few_tensors(tmp_path, to):
    source = big_adapter(tmp_path, 165)
    assert (source / "adapter_model.safetensors").stat().st_size > 280 * 2**20
    started = time.monotonic()
    output, _ = child(source, tmp_path / "out", to).communicate()
    peak = int(output.splitlines()[-1].removeprefix("peak "))
    assert 0 < peak < 100  # 0 would mean that nothing was measured
    assert time.monotonic() - started < 120
