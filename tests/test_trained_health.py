"""An adapter that the installed PEFT made and trained: of its numbers nothing is said; before training, just that."""

from __future__ import annotations

import pytest
import torch
from support import zoo

import peft_moe_compat


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_ordinary_training_leaves_nothing_to_say(tmp_path, family):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = zoo.tiny_model(family, num_experts_per_tok=4)
    targets = peft_moe_compat.expert_parameters(model)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=targets))
    about = {"model": model.base_model.model.config.to_dict()}
    model.save_pretrained(tmp_path / "fresh")
    fresh = peft_moe_compat.inspect_adapter(tmp_path / "fresh", **about).content
    assert {finding.code for finding in fresh} == {"not_trained"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(12):
        ids = zoo.token_ids(4, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    assert peft_moe_compat.inspect_adapter(tmp_path / "trained", **about).content == ()
