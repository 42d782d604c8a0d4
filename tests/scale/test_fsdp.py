"""FSDP2 on gloo ranks, by torch's fully_shard and by accelerate's plugin, against stock PEFT in one process."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from torch import Tensor, nn

import peft_moe_compat

from . import models
from .ranks import run

# Of float32 sums taken in another order, against the largest entry, over three steps.
TOLERANCE = 2e-5


def _shard(model: Any, units: str = "layer", **options: Any) -> None:
    """fully_shard on every decoder layer and the root, in place.

    Args:
        units: What is a group of its own besides: "experts", both the wrapped and the bare experts module; "chain",
            every wrapper and the bare module; "experts without layers"; "lora", each factor; "layer", nothing.
        options: Of `fully_shard`.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in models.decoder_layers(model):
        wrapped = models.outermost(getattr(layer, "_checkpoint_wrapped_module", layer))
        bare = wrapped.get_base_layer()
        apart = {"chain": [bare, wrapped.base_layer, wrapped], "layer": []}.get(units, [bare, wrapped])
        if units == "lora":
            apart = [m for m in wrapped.modules() if isinstance(m, nn.Linear)]
        for module in apart:
            fully_shard(module, **options)
        if units != "experts without layers":
            fully_shard(layer, **options)
    fully_shard(model, **options)


def _checkpoint(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = models.decoder_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)


def _checkpoint_in_transformers(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _lora(model: Any) -> set[nn.Parameter]:
    return {p for p in model.parameters() if p.requires_grad}


def _average_lora_gradients(model: Any) -> None:
    """What a training script does for adapters that FSDP2 is told to ignore."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not hasattr(parameter, "full_tensor"), f"{name} was meant to be replicated"
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _bfloat16(**options: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)} | options


def _offloaded() -> dict[str, Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return {"offload_policy": CPUOffloadPolicy(pin_memory=False)}  # pinning needs an accelerator


# name -> (before sharding, arguments of _shard, forwards per module and microbatch)
ARRANGEMENTS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "layers": (None, {}, 1),
    "layers-kept-gathered": (None, {"reshard_after_forward": False}, 1),
    "experts-apart": (None, {"units": "experts"}, 1),
    "experts-apart-kept-gathered": (None, {"units": "experts", "reshard_after_forward": False}, 1),
    "experts-without-layers": (None, {"units": "experts without layers"}, 1),
    "every-wrapper-apart": (None, {"units": "chain"}, 1),
    "checkpointing-of-transformers": (_checkpoint_in_transformers, {}, 2),
    "checkpoint-wrapper": (_checkpoint, {}, 2),
    "checkpoint-wrapper-experts-apart": (_checkpoint, {"units": "experts"}, 2),
    "cpu-offload": (None, _offloaded(), 1),
}
FEW = ("layers", "experts-apart")


def _sharded(family: str, arrangement: str) -> Any:
    prepare, arguments, _ = ARRANGEMENTS[arrangement]
    model = models.lora_model(family)
    if prepare is not None:
        prepare(model)
    _shard(model, **arguments)
    return model


def _facts(model: Any) -> list[tuple[str, ...]]:
    """What the report says of every parameter, its reason and the module's name included."""
    rows = peft_moe_compat.report(model).rows
    return [
        (models.plain_name(f"{row.module}.{p.name}."), p.shape, p.path, p.reason, p.adapters)
        for row in rows
        for p in row.parameters
    ]


def _train(family: str, arrangement: str) -> dict[str, Any]:
    model = _sharded(family, arrangement)
    return {"report": _facts(model), "tensors": models.train(model, models.batches())}


def _train_replicated(family: str, _: str) -> dict[str, Any]:
    model = models.lora_model(family)
    _shard(model, ignored_params=_lora(model))
    told = _facts(model)
    tensors = models.train(model, models.batches(), after_backward=lambda: _average_lora_gradients(model))
    return {"tensors": tensors, "report": told}


def _train_accumulated(family: str, _: str) -> dict[str, Any]:
    model = models.lora_model(family)
    _shard(model, units="experts")
    told, parts = _facts(model), models.BATCH // dist.get_world_size()

    @contextmanager
    def microbatch(last: bool) -> Any:
        model.set_requires_gradient_sync(last)
        yield

    tensors = models.train(model, models.batches(), microbatch=microbatch, microbatches=parts)
    return {"tensors": tensors, "report": told}


OTHERWISE = {"replicated": _train_replicated, "accumulated": _train_accumulated}


def _train_all(arrangements: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    """On every rank: each family in each arrangement, trained; what rank 0 found of it."""
    calls, found = models.Calls(), {}
    for family in models.FAMILIES:
        for name in arrangements:
            found[family, name] = OTHERWISE.get(name, _train)(family, name) | {"calls": calls.taken()}
    return found if dist.get_rank() == 0 else {}


@pytest.fixture(scope="module")
def single():
    """family -> losses, gradients and parameters of stock PEFT in one process, and the report before it."""
    found = {}
    peft_moe_compat.deactivate()
    try:
        for family in models.FAMILIES:
            found[family] = models.train(models.lora_model(family), models.batches())
    finally:
        peft_moe_compat.activate()
    return found


@pytest.fixture(scope="module")
def on_two():
    return run(2, _train_all, (*ARRANGEMENTS, *OTHERWISE))[0]


@pytest.fixture(scope="module", params=[1, 4])
def on_others(request):
    return run(request.param, _train_all, FEW)[0]


def _check(found: dict[str, Any], expected: dict[str, Tensor], family: str, forwards: int) -> None:
    """Numbers of one process; every forward the library's own; and a report that does not notice the sharding."""
    zoo.assert_same(found["tensors"], expected, TOLERANCE)
    assert found["calls"] == models.LAYERS * models.STEPS * forwards
    assert found["report"] == _facts(models.lora_model(family))
    assert {path for _, _, path, _, _ in found["report"]} == {"grouped_mm"}


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("arrangement", [*ARRANGEMENTS, *OTHERWISE])
def test_training_on_two_ranks(on_two, single, arrangement, family):
    forwards = ARRANGEMENTS[arrangement][2] if arrangement in ARRANGEMENTS else 1
    microbatches = models.BATCH // 2 if arrangement == "accumulated" else 1
    _check(on_two[family, arrangement], single[family], family, forwards * microbatches)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("arrangement", FEW)
def test_training_on_one_and_four_ranks(on_others, single, arrangement, family):
    _check(on_others[family, arrangement], single[family], family, 1)
