"""Quantised experts under DistributedDataParallel and FSDP2 on gloo ranks, and what is refused of other engines.

The oracle is the same quantised model in one process, on the whole batch; test_quantised.py proves that one.
"""

from __future__ import annotations

import re
import types
from typing import Any

import pytest
from support import zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import peft_moe_compat
from peft_moe_compat import ParallelismError

from . import models
from .quantised_models import base_model, experts_at_the_bottom, lora_model
from .ranks import run

FORMATS = ("bnb nf4", "bnb int8", "torchao Int8Tensor", "torchao Float8Tensor", "fp8 (fine-grained)", "mxfp4")
TOLERANCE = 2e-5


def _of_experts(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that quantised experts are held in, packed ones and scales."""
    held = {id(p) for experts in experts_at_the_bottom(model) for p in experts.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in held}


def _ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def _ddp_unsynchronised(model: Any) -> Any:
    """Each rank has loaded the same weights, so that there is nothing to send."""
    return DistributedDataParallel(model, init_sync=False)


def _ddp_without_experts(model: Any) -> Any:
    """As with `init_sync=False`, for a trainer that makes the wrapper itself."""
    model._ddp_params_and_buffers_to_ignore = list(_of_experts(model))
    return DistributedDataParallel(model)


def _fsdp(model: Any, **options: Any) -> Any:
    """fully_shard on every decoder layer and the root. Of bitsandbytes it shards the packed values, not the scales."""
    from torch.distributed.fsdp import fully_shard

    for layer in models.decoder_layers(model) if hasattr(model, "get_base_model") else model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _fsdp_without_experts(model: Any) -> Any:
    """Every rank keeps the whole of the quantised experts; all else is sharded, their LoRA included."""
    return _fsdp(model, ignored_params=set(_of_experts(model).values()))


ENGINES = {
    "DDP": _ddp,
    "DDP, init_sync=False": _ddp_unsynchronised,
    "DDP, experts ignored": _ddp_without_experts,
    "FSDP2": _fsdp,
    "FSDP2, experts ignored": _fsdp_without_experts,
}
# What upstream refuses without PEFT and without this library (torch 2.13.0 on gloo, torchao 0.18.0).
UPSTREAM = {
    ("DDP", "torchao Int8Tensor"): "NotImplementedError: Int8Tensor dispatch.*aten.view",
    ("DDP", "torchao Float8Tensor"): "AssertionError: Only support reshaping",
    ("DDP", "fp8 (fine-grained)"): "RuntimeError: Invalid scalar type",  # gloo sends no float8
    ("FSDP2", "torchao Int8Tensor"): "NotImplementedError: Int8Tensor dispatch.*aten.split",
    ("FSDP2", "torchao Float8Tensor"): "NotImplementedError: Float8Tensor dispatch.*aten.new_zeros",
}
CASES = [(engine, stored) for engine in ENGINES for stored in FORMATS if (engine, stored) not in UPSTREAM]


def _train(engine: str, stored: str) -> dict[str, Any]:
    model = lora_model(stored)
    packed = _of_experts(model).keys()
    wrapped = ENGINES[engine](model)
    sharded = {hasattr(p, "placements") for n, p in model.named_parameters() if n in packed}
    lora = {hasattr(p, "placements") for p in model.parameters() if p.requires_grad}
    report = {(p.format, p.path, p.reason) for row in peft_moe_compat.report(model).rows for p in row.parameters}
    return {"tensors": models.train(wrapped, models.batches()), "report": report, "sharded": (sharded, lora)}


def _refusal_of_upstream(engine: str, stored: str) -> str:
    model = base_model(stored).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    try:
        ENGINES[engine](model)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _on_ranks() -> dict[tuple[str, str], Any]:
    calls, found = models.Calls(), {}
    for engine, stored in CASES:
        found[engine, stored] = _train(engine, stored) | {"calls": calls.taken()}
    peft_moe_compat.deactivate()
    for engine, stored in UPSTREAM:
        found[engine, stored] = _refusal_of_upstream(engine, stored)
    return found


@pytest.fixture(scope="module")
def on_ranks():
    return run(2, _on_ranks)


@pytest.fixture(scope="module")
def single():
    return {stored: models.train(lora_model(stored), models.batches()) for stored in FORMATS}


@pytest.mark.parametrize(("engine", "stored"), CASES)
def test_training_equals_one_process_on_the_whole_batch(on_ranks, single, engine, stored):
    assert sum(".experts." in name for name in single[stored]) == (models.STEPS + 1) * models.LAYERS * 4
    for rank in on_ranks:
        found = rank[engine, stored]
        zoo.assert_same(found["tensors"], single[stored], TOLERANCE)
        assert found["calls"] == models.LAYERS * models.STEPS
        assert found["report"] == {(stored, "grouped_mm", "")}
        assert found["sharded"] == ({engine == "FSDP2"}, {engine.startswith("FSDP2")})


@pytest.mark.parametrize(("engine", "stored"), UPSTREAM)
def test_upstream_refuses_the_format_without_lora(on_ranks, engine, stored):
    """torch with bare transformers models. What goes around it is in `CASES`."""
    for rank in on_ranks:
        assert re.match(UPSTREAM[engine, stored], rank[engine, stored]), rank[engine, stored]


# Refused by name


def _packed(experts: Any, name: str) -> nn.Parameter:
    """The parameter a weight is held in."""
    packed = experts.parametrizations[name].original if name not in experts._parameters else experts._parameters[name]
    assert isinstance(packed, nn.Parameter)
    return packed


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("stored", FORMATS)
def test_quantised_experts_in_zero3_are_refused_by_name(stored, name):
    model = lora_model(stored)
    for experts in experts_at_the_bottom(model):
        _packed(experts, name).ds_id = 7
    with pytest.raises(ParallelismError, match=rf"{name} is quantised .* and partitioned by DeepSpeed ZeRO-3") as error:
        model(input_ids=zoo.token_ids())
    assert f"({stored})" in str(error.value)


def test_plain_experts_in_zero3_are_not_refused_for_their_format():
    model = lora_model("")
    ids = zoo.token_ids()
    before = zoo.loss_and_gradients(model, ids)
    for parameter in model.parameters():
        parameter.ds_id = 7
    zoo.assert_same(zoo.loss_and_gradients(model, ids), before, 0)


def test_fp8_experts_spread_over_ranks_are_refused_by_name():
    """Half of the experts on this rank, as far as their parameters tell."""
    model = lora_model("fp8 (fine-grained)")
    experts = experts_at_the_bottom(model)[0]
    for name in ("gate_up_proj", "down_proj"):
        weight = experts._parameters[name]
        weight.placements = ("Shard(0)",)
        weight.device_mesh = types.SimpleNamespace(get_local_rank=lambda: 0)
    experts.num_experts //= 2
    with pytest.raises(ParallelismError, match=r"quantised \(fp8 \(fine-grained\)\) and spread over ranks by expert"):
        model(input_ids=zoo.token_ids())


@pytest.mark.parametrize("stored", FORMATS)
def test_quantised_experts_that_exchange_tokens_are_refused_by_name(stored):
    """By their forward alone: a packed weight says nothing of how many experts it is of."""

    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the exchange was reached")

    model = lora_model(stored)
    for experts in experts_at_the_bottom(model):
        home = {"__name__": "transformers.distributed.exchange", "AssertionError": AssertionError}
        experts.forward = types.FunctionType(forward.__code__, home)
    with pytest.raises(ParallelismError, match="and spread over ranks by expert"):
        model(input_ids=zoo.token_ids())
