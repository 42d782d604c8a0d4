"""`peft-moe-compat bench` on the CPU, at sizes that take no time."""

import builtins
import json

import pytest
import torch
import transformers
from support import zoo
from torch import nn
from typer.testing import CliRunner

from peft_moe_compat import is_active, releases
from peft_moe_compat.cli import bench
from peft_moe_compat.cli import main as cli
from peft_moe_compat.quantising import packing

needs_fused = pytest.mark.skipif(
    not zoo.FUSED, reason="transformers 4 keeps Qwen3's experts one by one: there is no fused weight to time"
)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "400"})


SMALL = ("--shape", "4,2,16,8", "--rank", "2", "--device", "cpu", "--dtype", "float32")


@needs_fused
def test_it_measures_every_method_at_every_number_of_tokens(tmp_path):
    result = run(*SMALL, "--tokens", "3,9,3", "--backend", "loop", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["settings"]["shape"] == {"E": 4, "k": 2, "H": 16, "I": 8}
    assert document["versions"].items() >= releases.installed_versions("torch", "peft", "transformers").items()
    methods = ("frozen base", "stock PEFT", "peft_moe_compat")
    assert [(row["method"], row["tokens"]) for row in document["rows"]] == [(m, n) for m in methods for n in (3, 9)]
    assert all(row["both_ms"] > 0 and row["forward_ms"] > 0 and row["peak_mib"] > 0 for row in document["rows"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert all(method in result.output for method in methods)
    assert "backend loop" in result.output
    assert is_active()


@needs_fused
def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    result = run(*SMALL, "--tokens", "3", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "matplotlib is not installed" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@needs_fused
@pytest.mark.parametrize(
    "wrong",
    [
        ("--tokens", "abc"),
        ("--tokens", ""),
        ("--tokens", "-3"),
        ("--dtype", "int8"),
        ("--dtype", "foo"),
        ("--rank", "0"),
        ("--dropout", "1"),
        ("--format", "nf5"),
        ("--format", "mxfp4"),
        ("--device", "tpu"),
        ("--device", "cuda:x"),
        ("--device", "meta"),
        ("--shape", "2,4,32,32"),
        ("--shape", "4,2,33,7"),
        ("--model", "/nonexistent"),
        ("--out", "/dev/null/x"),
        ("--out", "/proc"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_measured_is_one_sentence(wrong):
    result = run(*SMALL, *wrong)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.output.startswith("error: ")


WEIGHTS = 4 * 128 * 64 * 3  # of "4,2,128,64"
BYTES = {
    "nf4": WEIGHTS * (1 / 2 + 4 / 64),
    "fp4": WEIGHTS * (1 / 2 + 4 / 64),
    "int8": WEIGHTS + 4 * (128 + 128) * 4,
    "fp8": WEIGHTS * (1 + 4 / 64**2),
    "mxfp4": WEIGHTS * (1 / 2 + 1 / 32) + 4 * (128 + 128) * 4,  # and biases
    "torchao-int8": WEIGHTS + 4 * (128 + 128) * 4,
    "torchao-float8": WEIGHTS + 4 * (128 + 128) * 4,
}


@needs_fused
@pytest.mark.parametrize("stored", BYTES)
def test_packed_experts_are_measured_beside_plain_ones(stored, tmp_path):
    if stored == "fp8":
        upstream = pytest.importorskip("transformers.integrations.finegrained_fp8", exc_type=ImportError)
        if not hasattr(upstream, "FP8Experts"):
            pytest.skip("transformers 5.0 has no FP8Experts")
    elif stored.startswith("torchao"):
        pytest.importorskip("torchao", reason="torchao is optional")
    elif stored != "mxfp4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    sizes = ("--shape", "4,2,128,64", "--rank", "2", "--device", "cpu", "--dtype", "float32", "--tokens", "3,9")
    result = run(*sizes, "--format", stored, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    methods = ("frozen base", "stock PEFT", "peft_moe_compat")
    found = [(row["stored"], row["method"], row["tokens"]) for row in rows]
    assert found == [(s, m, n) for s in ("float32", stored) for m in methods for n in (3, 9)]
    for row in rows:
        figures = [row["both_ms"], row["forward_ms"], row["peak_mib"]]
        if row["note"]:
            assert row["stored"] == stored
            assert row["method"] != "peft_moe_compat"
            assert row["note"].startswith("not measured: ")
            assert row["note"] in result.output
            assert figures == [None] * 3
        else:
            assert min(figures) > 0
        assert bool(row["backend"]) == (row["method"] == "peft_moe_compat")
        expected = BYTES[stored] if row["stored"] == stored else WEIGHTS * 4
        assert row["weights_mib"] * 2**20 == pytest.approx(expected, rel=0.02)


@needs_fused
def test_a_dropout_is_measured_beside_none(tmp_path):
    result = run(*SMALL, "--tokens", "3", "--dropout", "0.1", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["method"] for row in rows][2:] == ["peft_moe_compat", "peft_moe_compat, dropout 0.1"]
    assert all(row["both_ms"] > 0 for row in rows)


@needs_fused
def test_a_step_that_leaves_lora_without_a_gradient_is_not_a_measurement():
    settings = bench.Settings(bench.Shape(4, 2, 16, 8), rank=2, device="cpu", dtype="float32")
    layer = bench._Layer(settings)
    layer.add_lora()
    both, _ = layer.steps(3)
    both()
    layer.block["lost"] = nn.Linear(2, 2)
    with pytest.raises(bench.PeftMoeCompatError, match="2 of the LoRA weights get no gradient"):
        both()


@needs_fused
@pytest.mark.parametrize(
    ("package", "stored", "remedy"),
    [("bitsandbytes", "nf4", "pip install 'bitsandbytes>=0.49'"), ("torchao", "torchao-int8", "pip install torchao")],
)
def test_a_missing_package_is_said_before_anything_is_measured(package, stored, remedy, tmp_path, monkeypatch):
    find = packing.importlib.util.find_spec
    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured"))
    result = run(*SMALL, "--format", stored, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert remedy in result.output


@pytest.mark.skipif(zoo.FUSED, reason="transformers 5 has fused Qwen3 experts")
def test_transformers_4_is_refused_in_a_sentence(tmp_path):
    result = run(*SMALL, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "bench needs transformers 5.0 or newer" in result.output


@pytest.mark.parametrize("text", ["4,2,16", "4,2,16,many", "4,2,16,8,8"])
def test_a_shape_is_four_integers(text):
    result = run("--shape", text)
    assert result.exit_code == 1
    assert "4 integers with commas were expected" in result.output


def test_what_cannot_be_measured_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--shape", "4,2,16,8", "--device", "cuda", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "torch sees no CUDA device" in result.output


def test_the_shape_of_a_config(tmp_path):
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    assert bench.shape_of_config(str(tmp_path)) == bench.Shape(4, 2, 16, 24)
    of_nemotron = {"hidden_size": 64, "moe_latent_size": 16, "n_routed_experts": 4, "moe_intermediate_size": 24}
    kinds = {"moe_num_experts": 4, "moe_k": 2, "hidden_size": 16, "moe_intermediate_size": [24, 8]}
    for model_type, sizes in (("nemotron_h", of_nemotron), ("ernie4_5_vl_moe", {"text_config": kinds})):
        if model_type in transformers.CONFIG_MAPPING:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **sizes}))
            shape = bench.shape_of_config(str(tmp_path))
            assert (shape.E, shape.H, shape.I) == (4, 16, 24), model_type
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(bench.PeftMoeCompatError, match="pass --shape"):
        bench.shape_of_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(bench.PeftMoeCompatError, match="hidden_size|intermediate_size"):
        bench.shape_of_config(str(tmp_path))
