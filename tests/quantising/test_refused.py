"""What packing experts needs, under every release: transformers 5, and bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from support import zoo

from peft_moe_compat import BitsAndBytesExpertsConfig, PeftMoeCompatError, quantize_experts


@pytest.mark.skipif(zoo.FUSED, reason="transformers 5 converts checkpoints parameter by parameter")
def test_transformers_4_is_refused_with_the_release_that_can():
    for ask in (BitsAndBytesExpertsConfig, lambda: quantize_experts(torch.nn.Linear(2, 2))):
        with pytest.raises(PeftMoeCompatError, match=r"needs transformers 5\.0 or newer, and 4\."):
            ask()


@pytest.mark.skipif(not zoo.FUSED, reason="transformers 4 is refused before")
def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(PeftMoeCompatError, match=r"pip install 'bitsandbytes>=0\.49'"):
        quantize_experts(zoo.tiny_model("qwen3_moe"))
