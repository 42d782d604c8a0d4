"""`peft-moe-compat demo`: one tiny run, and what it says when its claims do not hold."""

import json
import math

import pytest
from typer.testing import CliRunner

from peft_moe_compat import NoExpertParametersError, PeftMoeCompatError, is_active
from peft_moe_compat.cli import demo, results
from peft_moe_compat.cli import main as cli

TINY = {"steps": 4, "hidden_size": 32, "experts": 4, "rank": 2, "tokens": 64}


def invoke(out, **options):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "out": out, **options}.items()]
    return CliRunner().invoke(cli.app, ["demo", *arguments], env={"COLUMNS": "300"})


def leg(path="peft", reason="", **measured):
    found = {"path": path, "reason": reason, "losses": [5.0, 4.0, 3.0, 2.0], "step_ms": 100.0, "peak_mib": 8.0}
    return {**found, "reload_difference": 0.0, **measured}


@pytest.fixture
def legs(monkeypatch):
    """Results of the runs, for tests that need no training; the test may change them."""
    found = {
        "stock": leg(reason="peft_moe_compat is not active"),
        "ours": leg("grouped_mm", step_ms=50.0, peak_mib=4.0, reload_difference=1e-6),
    }
    monkeypatch.setattr(demo, "_prepare", lambda settings, name: {})
    monkeypatch.setattr(demo, "_leg", lambda settings, name, base, ours: found["ours" if ours else "stock"])
    return found


def test_a_small_run_keeps_what_it_claims(tmp_path):
    result = invoke(tmp_path / "shown", models="gpt_oss")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "shown" / "demo.json").read_text())
    assert document["problems"] == []
    (outcome,) = document["models"]
    assert outcome["loss_difference"] <= 1e-4
    stock, ours = outcome["legs"]["stock"], outcome["legs"]["ours"]
    assert stock["path"] == "peft"
    assert stock["reason"].startswith("peft_moe_compat is not active")
    assert ours["path"] == ("peft" if ours["reason"] else "grouped_mm")
    for run in (stock, ours):
        assert len(run["losses"]) == TINY["steps"]
        assert run["losses"][-1] < run["losses"][0]
        assert run["step_ms"] > 0
        assert run["peak_mib"] > 0
        assert run["reload_difference"] <= 1e-4
    assert (tmp_path / "shown" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert all(text in result.output for text in ("gpt-oss", "stock PEFT", "peft_moe_compat", "the losses differ by"))
    assert is_active()


def test_it_shows_how_much_faster_and_smaller(tmp_path, legs):
    result = invoke(tmp_path, models="qwen3_moe")
    assert result.exit_code == 0, result.output
    assert "Qwen3-MoE: the losses differ by at most 0e+00; 2.0x as fast, 50% of the memory." in result.output


def test_it_says_where_both_runs_took_pefts_forward(tmp_path, legs):
    legs["stock"] = legs["ours"] = leg(reason="there is no registry")
    result = invoke(tmp_path)
    assert result.exit_code == 0, result.output
    assert "both runs took PEFT's own forward: there is no registry." in result.output
    assert (tmp_path / "demo.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "ours",
            {"losses": [5.0, 4.001, 3.0, 2.0]},
            "differ by up to 1.0e-03 in the first half of the steps; 0.0001 is",
        ),
        ("ours", {"losses": [5.0, 4.0, 3.0, 2.1]}, "differ by up to 1.0e-01 in the second half of the steps; 0.02 is"),
        ("ours", {"losses": [5.0, 4.0, 3.0, math.nan]}, "the loss curves differ by up to nan"),
        ("ours", {"reload_difference": 0.5}, "reloaded by stock PEFT, the adapter of peft_moe_compat gives logits"),
        ("stock", {"reload_difference": math.inf}, "reloaded by stock PEFT, the adapter of stock PEFT gives logits"),
    ],
)
def test_a_claim_that_does_not_hold_is_an_error(tmp_path, legs, name, change, message):
    legs[name].update(change)
    result = invoke(tmp_path, models="gpt_oss")
    assert result.exit_code == 1
    assert message in result.output
    assert len(json.loads((tmp_path / "demo.json").read_text())["problems"]) == 1


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc"])
def test_a_folder_that_cannot_be_written_is_found_out_first(out, legs):
    legs.clear()  # no run may begin
    result = invoke(out, models="gpt_oss")
    assert result.exit_code == 1
    assert "cannot be written" in result.output


def test_each_model_runs_once(tmp_path, legs):
    assert invoke(tmp_path, models="gpt_oss,gpt_oss").exit_code == 0
    assert len(json.loads((tmp_path / "demo.json").read_text())["models"]) == 1


def test_a_model_without_fused_experts_is_left_out(tmp_path, legs, monkeypatch):
    def refusing(settings, name):
        if name == "qwen3_moe":
            raise NoExpertParametersError("its experts are separate modules")
        return {}

    monkeypatch.setattr(demo, "_prepare", refusing)
    result = invoke(tmp_path)
    assert result.exit_code == 0, result.output
    assert "Qwen3-MoE was left out: its experts are separate modules" in result.output
    assert [bool(o["skipped"]) for o in json.loads((tmp_path / "demo.json").read_text())["models"]] == [True, False]
    result = invoke(tmp_path, models="qwen3_moe")
    assert result.exit_code == 1
    assert "None of the models has fused experts" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "--device is 'tpu'; cpu, cuda or cuda:N was expected"),
        ({"device": "cuda:x"}, "--device is 'cuda:x'"),
        ({"models": "bert"}, "--models 'bert' is none of qwen3_moe, gpt_oss"),
        ({"tokens": 100}, "--tokens 100 is not a positive multiple of 64"),
        ({"steps": 0}, "--steps 0 is not a positive multiple of 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    result = invoke(tmp_path, **options)
    assert result.exit_code == 1
    assert message in result.output


def test_a_python_without_its_source_files_is_refused():
    with pytest.raises(PeftMoeCompatError, match="keeps no source files"):
        demo._batches(demo.Settings(**TINY, device="cpu", models=()), "no_such_file_*.py", 1)


def test_memory_is_measured_above_what_is_in_use():
    import torch

    kept = torch.ones(2**20)
    assert 64 <= results.peak_mib(lambda: kept.expand(2**4, -1) + 1, "cpu") < 66  # MiB
