"""What `inspect` says of each reader, against what that reader's own code does with the file as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from peft_moe_compat import convert_adapter, inspect_adapter
from peft_moe_compat.adapters.reader_target import Target

from . import llama_cpp_reader, ordinary, sglang_reader, vllm_reader
from . import tiny as t

READERS = {"vLLM": vllm_reader.read, "SGLang": sglang_reader.read, "llama.cpp": llama_cpp_reader.read}
OLD_VLLM = vllm_reader.RELEASES[:-1]
REFUSALS = (AssertionError, KeyError, RuntimeError, ValueError)  # of the readers, and of torch within them
# File -> of vLLM, SGLang and llama.cpp: what each does, and the verdict says; or "unknown: " and what it does, where a
# conversion would change the file and it may be read all the same. "unseen" is what the harness cannot show: it has no
# base weights, which "pissa" changes, and nothing applied is the same as an alpha of zero.
CELLS = {
    "qwen3_moe per expert": ("reads", "reads", "unknown: reads"),
    "qwen3_moe per expert, rsLoRA": ("reads", "wrong", "wrong"),
    "qwen3_moe per expert, alpha_pattern": ("reads", "wrong", "wrong"),
    "qwen3_moe per expert, a pattern that changes nothing": ("reads", "reads", "unknown: reads"),
    "qwen3_moe per expert, rank_pattern": ("reads", "fails", "unknown: reads"),
    "qwen3_moe per expert, alpha_pattern of one expert": ("unknown: reads", "wrong", "wrong"),
    "qwen3_moe per expert, alpha_pattern of expert 0": ("unknown: reads", "wrong", "wrong"),
    "qwen3_moe per expert, down alone": ("fails", "wrong", "unknown: fails"),
    "qwen3_moe per expert, down alone, all targeted": ("fails", "unknown: reads", "unknown: fails"),
    "qwen3_moe per expert, up and down": ("fails", "fails", "unknown: fails"),
    "qwen3_moe per expert, targets by a pattern": ("reads", "fails", "unknown: reads"),
    "qwen3_moe per expert, one expert without": ("fails", "unknown: reads", "fails"),
    "qwen3_moe per expert, with a saved head": ("fails", "unknown: reads", "fails"),
    "qwen3_moe per expert, a saved head in the config alone": ("fails", "reads", "unknown: reads"),
    "qwen3_moe per expert, DoRA": ("fails", "fails", "fails"),
    "qwen3_moe per expert, pissa": ("fails", "wrong: unseen", "wrong: unseen"),
    "qwen3_moe per expert, no prefix": ("unknown: reads", "unknown: reads", "unknown: reads"),
    "qwen3_moe fused": ("fails", "fails", "fails"),
    "qwen3_moe stacked": ("fails", "unknown: reads", "fails"),
    "qwen3_moe stacked, down alone": ("fails", "wrong", "unknown: reads"),
    "qwen3_moe, llama.cpp's names": ("fails", "wrong", "reads"),
    "qwen3_moe, llama.cpp's names, down alone": ("fails", "wrong", "reads"),
    "qwen3_moe, llama.cpp's names, rsLoRA": ("fails", "wrong", "wrong"),
    "qwen3_moe, llama.cpp's names, an alpha of zero": ("fails", "wrong: unseen", "wrong"),
    "deepseek_v3 per expert": ("reads", "reads", "unknown: reads"),
    "granitemoe per expert": ("reads", "reads", "unknown: fails"),
    "mixtral per expert": ("reads", "fails", "unknown: reads"),
    "mixtral per expert, under mlp": ("wrong", "fails", "unknown: fails"),
    "mixtral per expert, under mlp, gate_proj": ("wrong", "unknown: reads", "unknown: fails"),
    "mixtral per expert, gate_proj": ("unknown: reads", "reads", "unknown: fails"),
    "mixtral fused": ("wrong", "fails", "fails"),
    "phimoe fused": ("wrong", "fails", "fails"),
    "phimoe per expert": ("reads", "fails", "unknown: reads"),
    "phimoe per expert, under mlp": ("wrong", "fails", "unknown: fails"),
    "phimoe per expert, gate_proj": ("fails", "reads", "unknown: fails"),
    "nemotron_h per expert": ("reads", "fails", "unknown: reads"),
    "nemotron_h per expert, gate_proj": ("fails", "reads", "unknown: fails"),
    "llama4 per expert": ("reads", "fails", "fails"),
    "llama4 stacked": ("fails", "fails", "fails"),
    "gpt_oss per expert": ("fails", "wrong", "fails"),
    "gpt_oss fused": ("reads", "fails", "fails"),
    "gpt_oss stacked": ("fails", "wrong", "fails"),
    "qwen3_vl_moe fused": ("reads", "fails", "fails"),
    "qwen3_vl_moe fused, rsLoRA": ("reads", "fails", "fails"),
    "qwen3_vl_moe fused, grouped": ("wrong", "fails", "fails"),
    "qwen3_vl_moe fused, reversed": ("fails", "fails", "fails"),
    "qwen3_vl_moe fused, down alone": ("fails", "fails", "fails"),
    "qwen3_vl_moe per expert": ("fails", "reads", "unknown: reads"),
    "qwen3_vl_moe fused, alpha_pattern": ("reads", "fails", "fails"),
    "qwen3_vl_moe fused, names of the text model": ("reads", "fails", "fails"),
    "qwen3_5_moe fused": ("reads", "fails", "fails"),
    "qwen3_5_moe per expert": ("fails", "reads", "unknown: fails"),
    "qwen3_5_moe_text fused": ("fails", "fails", "fails"),
    "qwen3_5_moe_text per expert": ("reads", "reads", "unknown: reads"),
    "llama4_text per expert": ("reads", "reads", "fails"),
}
# File -> what vLLM does before a release, where that is something else.
BEFORE = {
    "qwen3_moe per expert, rsLoRA": ("0.30", "wrong"),
    "qwen3_moe per expert, alpha_pattern": ("0.32", "wrong"),
    "qwen3_moe per expert, rank_pattern": ("0.32", "wrong"),
    "qwen3_moe per expert, alpha_pattern of one expert": ("0.32", "wrong"),
    "qwen3_moe per expert, alpha_pattern of expert 0": ("0.32", "wrong"),
    "qwen3_moe per expert, pissa": ("0.32", "wrong: unseen"),
    "mixtral per expert, under mlp, gate_proj": ("0.29", "fails"),
    "mixtral per expert, gate_proj": ("0.29", "fails"),
    "qwen3_vl_moe fused, rsLoRA": ("0.30", "unknown: reads"),
    "qwen3_vl_moe fused, alpha_pattern": ("0.32", "wrong"),
    "qwen3_vl_moe fused, names of the text model": ("0.33", "wrong"),
}


def does(read: Callable[..., t.Updates], folder: Path, base: dict[str, Any], wanted: t.Updates) -> str:
    """`"reads"` where the reader applies these updates, `"fails"` where it refuses, `"wrong"` for anything else."""
    try:
        found = read(folder, base)
    except REFUSALS:
        return "fails"
    nothing = torch.zeros((), dtype=torch.float64)
    right = wanted.keys() <= found.keys() and all(
        torch.allclose(update.double(), wanted.get(key, nothing), rtol=1e-4, atol=1e-5) for key, update in found.items()
    )
    return "reads" if right else "wrong"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ordinary.FILES)
def test_a_verdict_is_what_the_reader_does(tmp_path: Path, name: str, reader: str) -> None:
    file = ordinary.FILES[name]
    base, folder = file.base(), file.write(tmp_path)
    found = verdict(folder, base, file, reader)
    said, _, done = CELLS[name][list(READERS).index(reader)].partition(": ")
    assert found.verdict == said
    assert does(READERS[reader], folder, base, file.updates()) == (done or said).replace("unseen", "reads")


def verdict(folder: Path, base: dict[str, Any], file: ordinary.Ordinary, reader: str, release: str = "") -> Any:
    """That on a release, or on the newest."""
    found = inspect_adapter(folder, model=base, content=False, **file.flags).readers
    own = {shown.partition(">= ")[2].partition(",")[0]: v for shown, v in found.items() if shown.startswith(reader)}
    return next(v for since, v in reversed(own.items()) if not release or Version(since) <= Version(release))


@pytest.mark.parametrize("release", OLD_VLLM)
@pytest.mark.parametrize("name", ordinary.FILES)
def test_a_verdict_is_what_an_older_vllm_does(tmp_path: Path, name: str, release: str) -> None:
    file = ordinary.FILES[name]
    base, folder = file.base(), file.write(tmp_path)
    until, other = BEFORE.get(name, ("0", ""))
    said, _, done = (other if Version(release) < Version(until) else CELLS[name][0]).partition(": ")
    assert verdict(folder, base, file, "vLLM", release).verdict == said
    read = partial(vllm_reader.read, release=release)
    assert does(read, folder, base, file.updates()) == (done or said).replace("unseen", "reads")


@pytest.mark.parametrize("release", vllm_reader.RELEASES)
def test_the_classes_that_vllm_takes_fused_are_those_of_its_registry(release: str) -> None:
    assert Target("vllm", release=release).reader.fused == vllm_reader.natively_stacked(release)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in BEFORE if "pissa" not in name),
        "qwen3_5_moe_text fused",
        "qwen3_5_moe fused",
        "qwen3_moe fused",
    ],
)
def test_what_is_written_for_vllm_is_right_in_every_release(tmp_path: Path, name: str) -> None:
    file = ordinary.FILES[name]
    base, folder = file.base(), file.write(tmp_path / "in")
    every = convert_adapter(folder, tmp_path / "every", to="vllm", model=base, **file.flags)
    config = json.loads((every.out / "adapter_config.json").read_text())
    assert not any(config[field] for field in ("use_rslora", "rank_pattern", "alpha_pattern"))
    for release in vllm_reader.RELEASES:
        read = partial(vllm_reader.read, release=release)
        assert does(read, every.out, base, file.updates()) == "reads"
        own = convert_adapter(folder, tmp_path / release, to=f"vllm=={release}", model=base, **file.flags)
        assert does(read, own.out, base, file.updates()) == "reads"


CONVERTED = [
    ("gpt_oss per expert", "sglang"),
    ("qwen3_moe per expert, down alone", "sglang"),
    ("nemotron_h per expert, gate_proj", "sglang"),
    ("qwen3_moe, llama.cpp's names, rsLoRA", "llama.cpp"),
    ("qwen3_moe, llama.cpp's names, an alpha of zero", "llama.cpp"),
    ("qwen3_moe per expert, a saved head in the config alone", "vllm"),
    ("mixtral per expert, under mlp", "vllm"),
    ("phimoe per expert, gate_proj", "vllm"),
]


@pytest.mark.parametrize(("name", "to"), CONVERTED)
def test_what_is_wrong_as_it_is_is_right_once_converted(tmp_path: Path, name: str, to: str) -> None:
    file = ordinary.FILES[name]
    base, folder = file.base(), file.write(tmp_path / "in")
    done = convert_adapter(folder, tmp_path / "out", to=to, model=base, **file.flags)
    read = next(read for shown, read in READERS.items() if shown.lower() == to)
    assert does(read, done.out, base, file.updates()) == "reads"


def test_every_file_has_its_cells() -> None:
    assert CELLS.keys() == ordinary.FILES.keys()
    assert {cell for cells in CELLS.values() for cell in cells if cell.partition(":")[0] == "reads"} == {"reads"}
