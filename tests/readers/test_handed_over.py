"""What `adapter_tensors` hands over, taken from memory by the readers' own code, one training step after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from peft_moe_compat import AdapterStream, adapter_tensors

from . import sglang_reader, vllm_reader
from .truth import FIXTURES, base_config, expected

READERS = {"vllm": vllm_reader.read, "sglang": sglang_reader.read}
FAMILIES = ["qwen3_moe", "qwen3_moe_patterns", "mixtral", "gpt_oss", "nemotron_h"]


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
    folder = FIXTURES / f"peft/peft0212-tf5230/{family}"
    raw = base_config(folder)
    wanted = expected(folder, raw["model_type"])
    config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "transformers_version"})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), folder)
    stream = adapter_tensors(model, reader)
    for times, steps in ((1, [stream]), (3, two_steps(model, stream))):
        found = READERS[reader](steps, raw)
        assert wanted.keys() <= found.keys()
        for key, update in wanted.items():
            torch.testing.assert_close(found[key], times * update.double(), rtol=1e-5, atol=1e-7)
