"""Whatever lies in a folder is answered or refused with an error of this package, in little time and memory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.adapter_files import (
    GPT_OSS,
    QWEN,
    Spec,
    load,
    read_config,
    save,
    save_fused,
    save_per_expert,
    save_stacked,
)
from support.hostile import CONFIG, FOLDERS, MODELS, bounded
from support.tensor_files import SINGLE
from typer.testing import CliRunner

from peft_moe_compat.adapters import files
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.files import atomic_folder
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.patterns import Patterns
from peft_moe_compat.adapters.tensors import open_tensors
from peft_moe_compat.adapters.verify import verify_adapters
from peft_moe_compat.cli.main import app
from peft_moe_compat.errors import AdapterError, PeftMoeCompatError

SPEC = Spec(attention=True)
TARGETS = ("peft==0.18.1,transformers==5.0.0", "per-expert", "vllm", "sglang", "llama.cpp")


def good(folder: Path) -> Path:
    return save_fused(folder / "in", SPEC, SPEC.factors(("gate_up", "down")), peft_version="0.21.2")


def try_all(source: Path, folder: Path, model: object, **more: object) -> list[str]:
    """What was refused, of everything that can be done with an adapter."""
    calls = {"inspect": lambda: inspect_adapter(source), "and its model": lambda: inspect_adapter(source, model=model)}
    for at, to in enumerate(TARGETS):
        calls[to] = lambda out=folder / f"out{at}", to=to: convert_adapter(source, out, to=to, model=model, **more)
    calls["verify"] = lambda: verify_adapters(source, source, model=model)
    refused = []
    for name, call in calls.items():
        try:
            with bounded():
                call()
        except PeftMoeCompatError as error:
            assert len(str(error)) < 5000  # noqa: PT017
            refused.append(name)
    return refused


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_folders(tmp_path: Path, name: str) -> None:
    source = good(tmp_path)
    FOLDERS[name](source)
    refused = try_all(source, tmp_path, SPEC.model())
    assert refused or name.startswith("a base model")
    if not name.startswith("a base model"):
        assert "vllm" in refused
    result = CliRunner().invoke(app, ["inspect", str(source)])
    assert isinstance(result.exception, SystemExit) or result.exception is None
    assert "\x1b" not in result.output


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [save_fused, save_per_expert, save_stacked])
def test_hostile_base_models(tmp_path: Path, name: str, make) -> None:
    roles = ("gate", "up", "down") if make is save_per_expert else ("gate_up", "down")
    source = make(tmp_path / "in", SPEC, SPEC.factors(roles))
    if make is save_stacked:  # one pair shared by all
        shared = {name: factor[0] if factor.ndim == 3 else factor for name, factor in load(source).items()}
        save(source, {name: factor for name, factor in shared.items() if "gate_up" not in name}, read_config(source))
    assert "and its model" in try_all(source, tmp_path, MODELS[name], fill_missing=True)


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("family", [QWEN, GPT_OSS], ids=["qwen", "gpt_oss"])
@pytest.mark.parametrize("dtypes", itertools.product(DTYPES[:3], DTYPES), ids=str)
def test_float8_beside_others_and_folded(tmp_path: Path, family, dtypes) -> None:
    spec = Spec(family=family, attention=True, alphas={"down": 5, "up": 7}, ranks={"down": 3})
    for number, make in enumerate((save_fused, save_per_expert, save_stacked)):
        apart = make is save_per_expert
        factors = spec.factors(spec.linear_roles() if apart else spec.fused_roles())
        source = make(tmp_path / f"in{number}", spec, factors)
        tensors = {name: tensor.to(dtypes[at % 3 > 0]) for at, (name, tensor) in enumerate(load(source).items())}
        save(source, tensors, read_config(source))
        said = {"orientation": "linear", "packing": "rank_major", "nesting": family.parameters} if not number else {}
        inspected = []
        for to in TARGETS:
            out = tmp_path / f"out{number}{to}"
            try:
                inspect_adapter(source, model=spec.model())
                convert_adapter(source, out, to=to, model=spec.model(), **said)
                found = verify_adapters(source, out, model=spec.model(), **said)
                assert found.same, found.worst
                inspected.append(to)
            except AdapterError:
                pass
        assert len(inspected) >= 3 or torch.float8_e8m0fnu in dtypes


def test_a_header_of_a_hundred_thousand_tensors_passes(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    name = "base_model.model.model.layers.{}.mlp.experts.{}.gate_proj.lora_A.weight"
    raw = json.dumps({name.format(i // 400, i % 400): entry for i in range(100_000)}).encode()
    (tmp_path / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw)
    with bounded():
        assert len(open_tensors(tmp_path).infos) == 100_000


@pytest.mark.parametrize("alphas", [False, True], ids=["one alpha", "an alpha for each"])
def test_thousands_of_experts_are_inspected_in_seconds(tmp_path: Path, alphas: bool) -> None:
    """A third of Qwen3-30B-A3B's, whose files of matrices hold 18,432 pairs; the time is that of their number."""
    spec = Spec(E=128, layers=tuple(range(16)))
    source = save_per_expert(tmp_path / "in", spec, spec.factors(("gate", "up", "down")))
    names = [name.partition(".lora_A")[0] for name in load(source) if ".lora_A" in name]
    if alphas:
        pattern = {name.removeprefix("base_model.model.model."): 1 + at % 3 for at, name in enumerate(names)}
        save(source, load(source), {**read_config(source), "alpha_pattern": pattern})
    with bounded():
        found = inspect_adapter(source, model=spec.model())
    assert found.form == "per_expert"
    assert len(found.readers) > 5


def test_patterns_are_parsed_once_for_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Kimi K2, with a pattern for every expert, that was half of what `inspect` takes."""
    spec = Spec()
    source = save_per_expert(tmp_path / "in", spec, spec.factors(("gate", "up", "down")))
    names = [name.partition(".lora_A")[0] for name in load(source) if ".lora_A" in name]
    pattern = {name.removeprefix("base_model.model."): 1 + at % 3 for at, name in enumerate(reversed(names))}
    save(source, load(source), {**read_config(source), "alpha_pattern": pattern})
    made, looked = [], []
    init, look = Patterns.__init__, Patterns._find
    monkeypatch.setattr(Patterns, "__init__", lambda self, table: (made.append(len(table)), init(self, table))[1])
    monkeypatch.setattr(Patterns, "_find", lambda self, key: (looked.append(key), look(self, key))[1])
    inspect_adapter(source, model=spec.model(), content=False)
    assert made.count(len(pattern)) <= 2  # as it is, and in the order in which PEFT saves it
    assert looked
    assert max(map(looked.count, looked)) <= 2


def test_an_entry_for_every_linear_of_the_largest_models_passes(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.{n}" for i in range(61) for e in range(384) for n in ("w1", "w2", "w3")]
    config = {
        "target_modules": names,
        "rank_pattern": dict.fromkeys(names, 8),
        "alpha_pattern": dict.fromkeys(names, 8),
    }
    (tmp_path / CONFIG).write_text(json.dumps(config, indent=2))
    with bounded():
        assert files.read_json(tmp_path / CONFIG) == config


def test_out_that_links_to_itself(tmp_path: Path) -> None:
    source = good(tmp_path)
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(AdapterError):
        convert_adapter(source, tmp_path / "out", to="peft==0.21.2", model=SPEC.model())


@pytest.mark.skipif(os.name == "nt", reason="no such rights, and no such names, there")
def test_out_in_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root may read every folder, the system's answer is given here."""
    source, real, parent = good(tmp_path), os.open, tmp_path / "drop"
    parent.mkdir()

    def refusing(path, *args, **kwargs):
        if Path(path) == parent:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    convert_adapter(source, parent / "out", to="peft==0.21.2", model=SPEC.model())
    assert sorted(path.name for path in parent.iterdir()) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of a file there are text")
def test_paths_that_are_not_utf8(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SPEC.model()))
    good(tmp_path).rename(os.fsdecode(raw + b"/in\xff"))
    command = [sys.executable, "-c", "from peft_moe_compat.cli.main import app; app()"]
    for arguments, code in (
        ([b"inspect", raw + b"/in\xff"], 0),
        (
            [
                b"convert",
                raw + b"/in\xff",
                raw + b"/out\xff",
                b"--to",
                b"per-expert",
                b"--model",
                raw + b"/config.json",
            ],
            0,
        ),
        ([b"verify", raw + b"/in\xff", raw + b"/out\xff", b"--json", b"--model", raw + b"/config.json"], 0),
        ([b"inspect", raw + b"/\xfe"], 2),
        ([b"convert", raw + b"/in\xff", raw + b"/out\xff"], 2),
    ):
        result = subprocess.run([*command, *arguments], capture_output=True, check=False)
        assert result.returncode == code, result.stderr.decode()
        assert b"Traceback" not in result.stderr


def test_a_folder_of_another_machine_is_kept(tmp_path: Path) -> None:
    theirs = tmp_path / ".peft-moe-compat-elsewhere.example-00000000.tmp"
    theirs.mkdir()
    os.utime(theirs, (0, 0))
    with atomic_folder(tmp_path / "out", source=tmp_path.parent / "in"):
        assert theirs.exists()
