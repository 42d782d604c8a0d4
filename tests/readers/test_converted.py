"""What `convert_adapter` writes, read by the readers' own code: the updates are those of the release that trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from peft_moe_compat import AdapterError, convert_adapter, inspect_adapter

from . import llama_cpp_reader, sglang_reader, vllm_reader
from .truth import FIXTURES, base_config, expected

READERS = {"vllm": vllm_reader.read, "sglang": sglang_reader.read, "llama.cpp": llama_cpp_reader.read}
CASES = [
    "peft/peft0181-tf5230/qwen3_moe",
    "peft/peft0212-tf5230/qwen3_moe",
    "peft/peft0212-tf5230/qwen3_moe_patterns",
    "peft/peft0181-tf5230/qwen3_moe_down",
    "peft/peft0212-tf5230/qwen3_moe_gate_up",
    "peft/peft0181-tf5230/mixtral",
    "peft/peft0190-tf554/gpt_oss",
    "peft/peft0212-tf5230/qwen3_vl_moe",
    "peft/peft0181-tf5230/nemotron_h",
    "peft/peft0181-tf4576/granitemoe",
    "peft/peft0181-tf4576/qwen3_moe_per_expert_rslora",
    "handmade/unsloth_legacy_linear",
    "handmade/veomni_independent",
    "handmade/nemo_automodel_0_5",
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES)
def test_the_reader_applies_the_writers_updates(tmp_path: Path, case: str, reader: str) -> None:
    folder = FIXTURES / case
    config = base_config(folder)
    wanted = expected(folder, config["model_type"])
    assert wanted
    # SGLang reads every safetensors file of a folder.
    alone = shutil.copytree(folder, tmp_path / "in", ignore=shutil.ignore_patterns("truth.*"))
    verdicts = inspect_adapter(alone, model=config).readers
    verdict = [verdict.verdict for shown, verdict in verdicts.items() if shown.lower().split()[0] == reader][-1]
    convert_adapter(folder, tmp_path / "out", to=reader, model=config)
    found = READERS[reader](tmp_path / "out", config)
    if verdict == "fails":
        with pytest.raises((AssertionError, KeyError, RuntimeError, ValueError)):
            READERS[reader](alone, config)
    elif verdict != "unknown":
        as_it_is = READERS[reader](alone, config)
        same = as_it_is.keys() == found.keys() and all(torch.equal(as_it_is[key], found[key]) for key in found)
        assert same == (verdict == "reads")
    assert wanted.keys() <= found.keys()
    for key, update in found.items():
        if key in wanted:
            torch.testing.assert_close(update.float(), wanted[key], rtol=1e-4, atol=1e-5, msg=str(key))
        else:
            assert not update.any(), f"{key} is not in the adapter, but {reader} changes it"


@pytest.mark.parametrize("reader", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "case", ["tinker", "tinker_two_A", "tinker_gpt_oss", "tinker_nemotron_h", "megatron_shared_outer"]
)
def test_the_small_form_of_shared_factors_is_read(tmp_path: Path, case: str, reader: str) -> None:
    folder = FIXTURES / "handmade" / case
    config = base_config(folder)
    out = convert_adapter(folder, tmp_path / "out", to="shared-outer", model=config).out
    if (case, reader) == ("tinker_nemotron_h", "vllm"):
        with pytest.raises(AssertionError):  # it wants w1, w2 and w3, with a gate or without
            vllm_reader.read(out, config, shared=True)
        return
    found = vllm_reader.read(out, config, shared=True) if reader == "vllm" else sglang_reader.read(out, config)
    wanted = expected(folder, config["model_type"])
    assert found.keys() == wanted.keys()
    for key, update in found.items():
        torch.testing.assert_close(update.float(), wanted[key], rtol=1e-4, atol=1e-5, msg=str(key))


def test_what_sglang_refuses_is_refused_before_it_is_written(tmp_path: Path) -> None:
    folder = FIXTURES / "peft/peft0181-tf5230/llama4"
    config = base_config(folder) | {"architectures": ["Llama4ForConditionalGeneration"]}
    with pytest.raises(AdapterError, match="SGLang takes no LoRA on the experts of llama4"):
        convert_adapter(folder, tmp_path / "out", to="sglang", model=config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["sglang", "llama.cpp"])
def test_llama4(tmp_path: Path, reader: str) -> None:
    test_the_reader_applies_the_writers_updates(tmp_path, "peft/peft0181-tf5230/llama4", reader)
