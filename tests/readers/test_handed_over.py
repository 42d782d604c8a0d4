"""What `adapter_tensors` hands over, taken from memory by the readers' own code, one training step after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from peft_moe_compat import AdapterStream, adapter_tensors

from . import sglang_reader, vllm_reader
from .truth import FIXTURES, base_config, expected

READERS = {"vllm": vllm_reader.read, "sglang": sglang_reader.read}
FAMILIES = ["qwen3_moe", "qwen3_moe_patterns", "mixtral", "gpt_oss", "nemotron_h"]


def handed_over(family: str, to: str) -> tuple[nn.Module, AdapterStream, dict[str, Any], dict[Any, Tensor]]:
    """A model, its stream, the base's config, and (layer, expert, role) -> the update."""
    folder = FIXTURES / f"peft/peft0212-tf5230/{family}"
    raw = base_config(folder)
    config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "transformers_version"})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), folder)
    return model, adapter_tensors(model, to), raw, expected(folder, raw["model_type"])


def two_steps(model: nn.Module, stream: AdapterStream) -> Iterator[AdapterStream]:
    """Between them every update becomes three times as large."""
    yield stream
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
    yield stream


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reader_applies_the_updates_of_the_last_step(family: str, reader: str) -> None:
    model, stream, raw, wanted = handed_over(family, reader)
    for times, steps in ((1, [stream]), (3, two_steps(model, stream))):
        found = READERS[reader](steps, raw)
        assert wanted.keys() <= found.keys()
        for key, update in wanted.items():
            torch.testing.assert_close(found[key], times * update.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("release", vllm_reader.RELEASES)
@pytest.mark.parametrize("how", ["tensor", "expert"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_each_rank_of_vllm_takes_its_part(family: str, how: str, release: str) -> None:
    """Of gate's and up's rows and down's columns, or of the experts."""
    stream, raw, wanted = handed_over(family, f"vllm=={release}")[1:]
    for rank in range(2):
        found = vllm_reader.read([stream], raw, release=release, share=(how, rank, 2))
        experts = {expert for _, expert, _ in found}
        assert found
        for (layer, expert, role), update in found.items():
            if how == "expert":
                whole = wanted[layer, expert + rank * len(experts), role]
            else:
                whole = wanted[layer, expert, role].chunk(2, dim=1 if role == "down" else 0)[rank]
            torch.testing.assert_close(update, whole.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_each_rank_of_sglang_takes_its_part(family: str) -> None:
    stream, raw, wanted = handed_over(family, "sglang")[1:]
    for rank in range(2):
        found = sglang_reader.read([stream], raw, rank=rank, size=2)
        assert found.keys() >= wanted.keys()
        for (layer, expert, role), whole in wanted.items():
            part = whole.chunk(2, dim=1 if role == "down" else 0)[rank]
            torch.testing.assert_close(found[layer, expert, role], part.double(), rtol=1e-5, atol=1e-7)
