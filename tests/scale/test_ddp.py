"""DistributedDataParallel on gloo ranks: every LoRA factor has a gradient on every rank, tokens or none."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import zoo
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peft_moe_compat

from . import models
from .ranks import run

TOLERANCE = 2e-5
# Which experts the tokens of each rank may go to. 5 gets none anywhere, 3 and 4 none on one of the ranks.
ALLOWED = ((0, 1, 2, 3), (0, 1, 2, 4))
IDLE, SOMETIMES_IDLE = (5,), (3, 4)


def _steer(model: Any) -> None:
    """Keeps the tokens of rank r, the r-th half of them in a single process, to the experts `ALLOWED[r]`."""

    def hook(router: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, _, index = output
        halves = [logits] if dist.is_initialized() else logits.chunk(2)
        allowed = ALLOWED[dist.get_rank() :] if dist.is_initialized() else ALLOWED
        masked = []
        for half, experts in zip(halves, allowed, strict=False):
            forbidden = [e for e in range(half.shape[1]) if e not in experts]
            masked.append(half.index_fill(1, torch.tensor(forbidden), float("-inf")))
        values, chosen = torch.cat(masked).topk(index.shape[1])
        return logits, values.softmax(-1), chosen

    for layer in models.decoder_layers(model):
        block = layer.mlp
        (block.gate if hasattr(block, "gate") else block.router).register_forward_hook(hook)


def _steered(family: str) -> Any:
    model = models.lora_model(family)
    _steer(model)
    return model


def _by_expert(name: str, gradient: Tensor) -> Tensor | None:
    """Largest gradient entry of each of 6 experts, for lora_A "(E r) p" and lora_B "q (r E)" of an experts module."""
    if ".experts." not in name:
        return None
    rows = gradient.view(6, -1) if "lora_A" in name else gradient.view(-1, 6).t()
    return rows.abs().amax(1)


def _local_gradients(family: str) -> dict[str, Tensor | None]:
    """Those of one backward on this rank alone, before any averaging."""
    model = DistributedDataParallel(_steered(family), find_unused_parameters=False)
    ids = models.batches()[0].chunk(dist.get_world_size())[dist.get_rank()]
    with model.no_sync():
        model(input_ids=ids, labels=ids).loss.backward()
    return {models.plain_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}


def _no_token_at_all() -> dict[str, Tensor]:
    """An experts module on which one rank has no tokens, hidden states "0 H": its averaged gradients."""
    experts = zoo.wrap(zoo.build(_qwen3_moe_experts()), ["gate_up_proj", "down_proj"])["experts"]
    model = DistributedDataParallel(experts, find_unused_parameters=False)
    inputs = _inputs()
    if dist.get_rank() == 1:
        inputs = tuple(t[:0] for t in inputs)
    for _ in range(2):  # the second one fails if the first left a bucket waiting
        model.zero_grad()
        model(*inputs).square().sum().backward()
    return {models.plain_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}


def _qwen3_moe_experts() -> zoo.Found:
    return next(c for c in zoo.DECORATED if c.name == "Qwen3MoeExperts")


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(zoo.T, zoo.H, generator=generator)
    scores, index = torch.randn(zoo.T, zoo.E, generator=generator).softmax(-1).topk(zoo.TOP_K)
    return hidden_states, index, scores


def _on_ranks() -> dict[str, Any]:
    """On every rank: what it found."""
    calls, found = models.Calls(), {}
    for family in models.FAMILIES:
        found["local", family] = _local_gradients(family)
        calls.taken()
        model = DistributedDataParallel(_steered(family), find_unused_parameters=False)
        found["step", family] = models.train(model, models.batches()), calls.taken()
        model = DistributedDataParallel(_steered(family), find_unused_parameters=False)

        def microbatch(last: bool, model: Any = model) -> Any:
            return nullcontext() if last else model.no_sync()

        tensors = models.train(model, models.batches(), microbatch=microbatch, microbatches=2)
        found["accumulated", family] = tensors, calls.taken()
        model = _steered(family)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = DistributedDataParallel(model, find_unused_parameters=False)
        found["checkpointed", family] = models.train(model, models.batches()), calls.taken()
        found["report", family] = peft_moe_compat.report(model).rows
    torch.manual_seed(3)
    found["no token"] = _no_token_at_all()
    return found


@pytest.fixture(scope="module")
def on_ranks():
    return run(2, _on_ranks)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(("case", "forwards"), [("step", 1), ("accumulated", 2), ("checkpointed", 2)])
def test_training_equals_one_process_on_the_whole_batch(on_ranks, stock, case, forwards, family):
    expected = stock(lambda: models.train(_steered(family), models.batches()))
    for rank in on_ranks:
        tensors, calls = rank[case, family]
        zoo.assert_same(tensors, expected, TOLERANCE)
        assert calls == models.LAYERS * models.STEPS * forwards


@pytest.mark.parametrize("family", models.FAMILIES)
def test_experts_without_tokens_have_zero_gradients(on_ranks, family):
    for number, rank in enumerate(on_ranks):
        idle = IDLE + tuple(set(SOMETIMES_IDLE) - set(ALLOWED[number]))
        gradients = rank["local", family]
        assert all(g is not None for g in gradients.values())
        largest = [found for n, g in gradients.items() if (found := _by_expert(n, g)) is not None]
        assert len(largest) == 4 * models.LAYERS
        for experts in largest:
            assert [e for e in range(6) if experts[e] == 0] == sorted(idle)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_report_sees_through_the_wrapper(on_ranks, family):
    rows = peft_moe_compat.report(models.lora_model(family)).rows
    for rank in on_ranks:
        assert [row.parameters for row in rank["report", family]] == [row.parameters for row in rows]
        assert {p.path for row in rows for p in row.parameters} == {"grouped_mm"}


def test_a_rank_without_any_token(on_ranks, stock):
    """Its gradients are zeros, so that the average is half of what the other rank alone has."""

    def alone() -> dict[str, Tensor]:
        torch.manual_seed(3)
        holder = zoo.wrap(zoo.build(_qwen3_moe_experts()), ["gate_up_proj", "down_proj"])
        holder["experts"](*_inputs()).square().sum().backward()
        return {n.removeprefix("experts."): p.grad / 2 for n, p in holder.named_parameters() if p.grad is not None}

    expected = stock(alone)
    assert len(expected) == 4
    for rank in on_ranks:
        zoo.assert_same(rank["no token"], expected, TOLERANCE)
