"""Liger's kernels beside this library, as Trainer's `use_liger_kernel` puts them into a model that PEFT has wrapped."""

from __future__ import annotations

import pytest
import torch
from support import zoo
from transformers import Trainer, TrainingArguments

import peft_moe_compat
from peft_moe_compat import CompatWarning, report

# What needs a GPU of Liger's; its experts forward is bound without one.
ON_CPU = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": False}


def trainer_of(model, folder, **kernels):
    rows = [{"input_ids": torch.arange(4) + i, "labels": torch.arange(4) + i} for i in range(4)]
    options = {"use_liger_kernel": True, "liger_kernel_config": ON_CPU | kernels, "report_to": [], "use_cpu": True}
    return Trainer(model, TrainingArguments(folder, max_steps=2, **options), train_dataset=rows)


@pytest.fixture(autouse=True)
def _classes_as_they_were():
    """Liger puts its experts in the place of a class of transformers as well."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    genuine = modeling_qwen3_moe.Qwen3MoeExperts
    yield
    modeling_qwen3_moe.Qwen3MoeExperts = genuine


def test_its_experts_forward_is_bound_and_named_with_the_remedy(tmp_path):
    model = zoo.peft_model(zoo.tiny_model("qwen3_moe"))
    trainer = trainer_of(model, tmp_path)
    named = r"the forward of liger_kernel.* is bound.*set liger_kernel_config={\"swiglu\": False}"
    with pytest.warns(CompatWarning, match=named), pytest.raises((AttributeError, RuntimeError)):
        trainer.train()
    reasons = [p.reason for row in report(model).rows for p in row.parameters if p.path == "peft"]
    assert len(reasons) == 2  # the outer wrapper of each layer
    assert all('liger_kernel_config={"swiglu": False}' in reason for reason in reasons)


def test_with_the_remedy_the_fast_path_is_taken(tmp_path):
    model = zoo.peft_model(zoo.tiny_model("qwen3_moe"))
    trainer_of(model, tmp_path, swiglu=False).train()
    found = report(model)
    assert {p.path for row in found.rows for p in row.parameters} == {"grouped_mm"}
    assert found.warnings == ()
    assert peft_moe_compat.is_active()
