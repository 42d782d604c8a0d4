"""`peft-moe-compat demo`: one tiny run through all its processes, and what it says when its claims do not hold."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_moe_compat import NoExpertParametersError, releases
from peft_moe_compat.cli import demo, demo_stages
from peft_moe_compat.cli import main as cli

TINY = {"steps": 4, "prepare_steps": 2, "hidden_size": 32, "experts": 4, "layers": 1, "rank": 2, "tokens": 64}


def invoke(out, **options):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "out": out, **options}.items()]
    return CliRunner().invoke(cli.app, ["demo", *arguments], env={"COLUMNS": "300"})


def leg(path="peft", reason="", losses=(5.0, 4.0, 3.0, 2.0), digest="same", peak_bytes=2**20):
    seconds = [9.0, 9.0, 9.0, 0.1] if path == "peft" else [9.0, 9.0, 9.0, 0.05]
    return {
        "path": path,
        "reason": reason,
        "losses": list(losses),
        "digest": digest,
        "step_seconds": seconds,
        "peak_bytes": peak_bytes,
    }


@pytest.fixture
def stages(monkeypatch):
    """Results of the stages, by stage, for tests that need no training; the test may change them."""
    results = {
        "prepare": {},
        "stock": leg(reason="peft_moe_compat is not active"),
        "ours": leg("grouped_mm", peak_bytes=2**19),
        "reload": {"stock": 0.0, "ours": 1e-6},
    }

    def run_stage(stage, job, on_step):
        on_step(1, None if stage == "reload" else 5.0)
        return results[stage]

    monkeypatch.setattr(demo, "_run_stage", run_stage)
    return results


def test_a_small_run_keeps_what_it_claims(tmp_path):
    result = invoke(tmp_path / "shown", models="gpt_oss")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "shown" / "demo.json").read_text())
    assert document["problems"] == []
    (outcome,) = document["models"]
    assert outcome["loss_difference"] <= 1e-4
    assert max(outcome["reload_difference"].values()) <= 1e-4
    stock, ours = outcome["legs"]["stock"], outcome["legs"]["ours"]
    assert stock["digest"] == ours["digest"]
    assert stock["path"] == "peft"
    assert ours["path"] == ("peft" if ours["reason"] else "grouped_mm")
    for run in (stock, ours):
        assert len(run["losses"]) == len(run["step_seconds"]) == TINY["steps"]
        assert run["losses"][-1] < run["losses"][0]
        assert min(run["step_seconds"]) > 0
    assert (tmp_path / "shown" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert all(text in result.output for text in ("gpt-oss", "stock PEFT", "peft_moe_compat", "the losses differ by"))


def test_it_shows_how_much_faster_and_smaller(tmp_path, stages):
    result = invoke(tmp_path, models="qwen3_moe")
    assert result.exit_code == 0, result.output
    assert "Qwen3-MoE: the losses differ by at most 0e+00; 2.0x as fast, 50% of the memory." in result.output


def test_it_says_where_both_runs_took_pefts_forward_and_memory_is_unknown(tmp_path, stages):
    stages["stock"] = stages["ours"] = leg(reason="there is no registry", peak_bytes=None)
    result = invoke(tmp_path)
    assert result.exit_code == 0, result.output
    assert "both runs took PEFT's own forward: there is no registry." in result.output
    assert (tmp_path / "demo.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("ours", {"losses": [5.0, 4.0, 3.0, 2.001]}, "the loss curves differ by up to 1.0e-03; 0.0001 is allowed"),
        ("ours", {"losses": [5.0, 4.0, 3.0, math.nan]}, "the loss curves differ by up to nan"),
        ("ours", {"digest": "other"}, "did not start from the same adapter and data"),
        ("reload", {"ours": 0.5}, "reloaded by stock PEFT, the adapter of peft_moe_compat gives logits"),
        ("reload", {"stock": math.inf}, "reloaded by stock PEFT, the adapter of stock PEFT gives logits"),
    ],
)
def test_a_claim_that_does_not_hold_is_an_error(tmp_path, stages, stage, change, message):
    stages[stage].update(change)
    result = invoke(tmp_path, models="gpt_oss")
    assert result.exit_code == 1
    assert message in result.output
    assert len(json.loads((tmp_path / "demo.json").read_text())["problems"]) == 1


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc"])
def test_a_folder_that_cannot_be_written_is_found_out_first(out, stages):
    stages.clear()  # no stage may run
    result = invoke(out, models="gpt_oss")
    assert result.exit_code == 1
    assert "cannot be written" in result.output


def test_each_model_runs_once(tmp_path, stages):
    assert invoke(tmp_path, models="gpt_oss,gpt_oss").exit_code == 0
    assert len(json.loads((tmp_path / "demo.json").read_text())["models"]) == 1


def test_a_looser_tolerance_can_be_asked_for(tmp_path, stages):
    stages["ours"]["losses"][-1] += 1e-3
    assert invoke(tmp_path, models="gpt_oss", tolerance=1e-2).exit_code == 0


def test_a_model_without_fused_experts_is_left_out(tmp_path, stages, monkeypatch):
    run_stage = demo._run_stage

    def refusing(stage, job, on_step):
        if job.model == "qwen3_moe":
            raise NoExpertParametersError("its experts are separate modules")
        return run_stage(stage, job, on_step)

    monkeypatch.setattr(demo, "_run_stage", refusing)
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
        ({"device": "tpu"}, "--device 'tpu' is none of"),
        ({"device": "cuda:x"}, "--device 'cuda:x' is none of"),
        ({"models": "bert"}, "--models 'bert' is none of qwen3_moe, gpt_oss"),
        ({"tokens": 100}, "--tokens 100 is not a positive multiple of 64"),
        ({"prepare_steps": 0}, "--prepare-steps 0 is not a positive multiple of 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    result = invoke(tmp_path, **options)
    assert result.exit_code == 1
    assert message in result.output


def test_what_the_demo_needs_is_named(tmp_path, monkeypatch):
    installed = releases.installed_versions
    monkeypatch.setattr(demo, "installed_versions", lambda *n: {**installed(*n), "matplotlib": "not installed"})
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert 'The demo needs matplotlib: pip install "peft-moe-compat[demo]"' in result.output


def a_job(tmp_path, **options):
    return demo_stages.Job(demo.Settings(**{**TINY, **options}), "gpt_oss", tmp_path)


def test_a_stage_that_fails_says_why_and_what_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "known_issues", lambda peft, transformers: [releases.KNOWN_ISSUES[0]])
    with pytest.raises(
        demo.DemoError, match=r"'nonsense' of gpt-oss failed \(exit code 1\):\nKeyError: 'nonsense'"
    ) as e:
        demo._run_stage("nonsense", a_job(tmp_path), lambda step, loss: None)
    assert releases.KNOWN_ISSUES[0].remedy in str(e.value)
    assert "line" not in str(e.value).splitlines()[1]


@pytest.mark.parametrize("error", [demo.DemoError("[no] GPU"), NoExpertParametersError("no experts")])
def test_a_refusal_travels_from_the_stage_to_the_demo(tmp_path, monkeypatch, capfd, error):
    def refusing(job):
        raise error

    monkeypatch.setattr(demo_stages, "_prepare", refusing)
    options = json.dumps(demo.asdict(a_job(tmp_path).settings))
    assert demo_stages.main("prepare", "gpt_oss", str(tmp_path), options) == 1
    said = capfd.readouterr().out

    class Process:
        """Stands for the stage's process: it says what the stage said."""

        returncode, stdout = 1, said.splitlines(keepends=True)

        def __init__(self, *_args, **_kwargs): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...

    monkeypatch.setattr(demo.subprocess, "Popen", Process)
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        demo._run_stage("prepare", a_job(tmp_path), lambda step, loss: None)


def test_stages_see_the_one_gpu_asked_for_and_no_other_activation(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert demo._environment(demo.Settings(device="cuda:1"), ours=True)["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert demo._environment(demo.Settings(device="cuda"), ours=True)["CUDA_VISIBLE_DEVICES"] == "0"
    cpu = demo._environment(demo.Settings(), ours=False)
    assert cpu["PEFT_MOE_COMPAT"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in cpu
    assert a_job(tmp_path, device="cuda:1").device == "cuda"


def test_a_python_without_its_source_files_is_refused():
    with pytest.raises(demo.DemoError, match="keeps no source files"):
        demo_stages._text("no_such_file_*.py")


def test_memory_is_measured_above_what_is_in_use():
    import torch

    peak = demo_stages._peak_above_now("cpu")
    if not Path("/proc/self/clear_refs").exists():
        assert peak() is None
        return
    torch.ones(2**24)  # 64 MiB
    assert 2**26 * 0.9 < peak() < 2**26 * 1.5
