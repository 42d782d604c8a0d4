"""Readers by release and by class."""

from __future__ import annotations

import json

import pytest
from support.adapter_files import load

from peft_moe_compat import AdapterError, AmbiguousAdapterError, convert_adapter, inspect_adapter
from peft_moe_compat.adapters.reader_target import parse_target
from peft_moe_compat.adapters.readers import READERS

QWEN = {"num_experts": 4, "hidden_size": 16, "moe_intermediate_size": 12}


def test_rows_are_in_order_and_the_newest_reads_most():
    for name, rows in READERS.items():
        sinces = [tuple(map(int, row.since.split("."))) for row in rows if row.since]
        assert sinces == sorted(set(sinces))
        assert len(rows) == 1 or len(sinces) == len(rows), name


@pytest.mark.parametrize(
    ("to", "since"), [("vllm==0.28", "0.28"), ("vllm==0.29.1", "0.29"), ("vllm==0.31.0", "0.30"), ("vllm==9", "0.33")]
)
def test_a_release_has_the_row_that_holds_for_it(to, since):
    target = parse_target(to)
    assert target.reader.since == since
    assert str(target) == to


@pytest.mark.parametrize("to", ["vllm==0.27.1", "vllm==", "vllm==new", "sglang==0.5.23", "per-expert==1", "vlm"])
def test_what_is_no_known_release_is_refused(to):
    with pytest.raises(AdapterError, match="expected"):
        parse_target(to)


@pytest.fixture
def adapter(tmp_path):
    """Fused, linear, rsLoRA, with a pattern."""
    import torch
    from safetensors.torch import save_file

    path = "base_model.model.model.layers.0.mlp.experts"
    shapes = {".base_layer": (8, 16, 24), "": (8, 12, 16)}
    tensors = {}
    for suffix, (rows, fan_in, fan_out) in shapes.items():
        tensors[f"{path}{suffix}.lora_A.weight"] = torch.randn(rows, fan_in)
        tensors[f"{path}{suffix}.lora_B.weight"] = torch.randn(fan_out, rows)
    config = {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "alpha_pattern": {"experts.down_proj": 8},
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_class_decides_the_form_and_an_open_one_is_refused(adapter, tmp_path):
    text = {**QWEN, "model_type": "qwen3_5_moe_text"}
    whole = {"model_type": "qwen3_5_moe", "text_config": text}
    alone = {**text, "architectures": ["Qwen3_5MoeForCausalLM"]}
    convert_adapter(adapter, tmp_path / "whole", to="vllm", model=whole)
    convert_adapter(adapter, tmp_path / "alone", to="vllm", model=alone)
    assert not any(".experts.0." in name for name in load(tmp_path / "whole"))
    assert all("model.language_model.layers" in name for name in load(tmp_path / "whole"))
    assert all(".experts." in name and "_proj." in name for name in load(tmp_path / "alone"))
    with pytest.raises(AmbiguousAdapterError, match="architectures"):
        convert_adapter(adapter, tmp_path / "open", to="vllm", model=text)
    assert inspect_adapter(adapter, model=text).readers["vLLM >= 0.33"].verdict == "unknown"


def test_a_scaling_that_a_release_ignores_is_folded(adapter, tmp_path):
    model = {**QWEN, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    for to in ("vllm", "vllm==0.28", "vllm==0.30", "vllm==0.33"):
        done = convert_adapter(adapter, tmp_path / to, to=to, model=model)
        config = json.loads((done.out / "adapter_config.json").read_text())
        heeds = to == "vllm==0.33"
        assert (config["use_rslora"], bool(config["alpha_pattern"])) == (to in ("vllm==0.30", "vllm==0.33"), heeds)
        assert any("folded" in str(step) for step in done.steps) is not heeds
