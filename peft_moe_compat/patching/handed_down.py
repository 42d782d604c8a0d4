"""What the wrappers of an experts module hand down to it: where to read the LoRA of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import layout
from ..errors import LayoutError, PeftMoeCompatError
from ..forward.fused import runs_fused
from ..forward.layer import Mixed, experts_forward
from ..layout import ExpertLora, FlatLora, MixedLora
from ..model.experts import is_transposed
from ..model.sharding import batch_of, exchanges_tokens, still_sharded
from ..model.wrappers import dropout_of, held_weight, read_adapter
from ..releases import LayoutRule

__all__ = ["ROUTED", "Handover", "carried", "forward_of_samples"]

ROUTED = ("hidden_states", "top_k_index", "top_k_weights")
# Tokens that make a pass of the fused kernels worth it where another one has all adapters. On an H100, a layer of
# Qwen3-30B's sizes, forward and backward, each pass takes 1.5 ms and 0.3 per 1024 tokens, torch's 2.5 and 1.4.
_TOKENS_OF_A_PASS = 1024

# What the registered experts function looks for where the exchange of tokens takes no keyword arguments. Set for one
# call within one thread; a recomputation sets it again.
carried: ContextVar[Handover | None] = ContextVar("peft_moe_compat_carried", default=None)


class Handover:
    """What wrappers hand down to the experts module: where to read their updates, and whether that arrived.

    Beside it what the outermost wrapper has found of the module, for the others.

    No container, so that hooks which map over a call's arguments pass it on as it is.
    """

    def __init__(self, experts: Any, rule: LayoutRule) -> None:
        self.experts, self.rule = experts, rule
        self.is_transposed = is_transposed(experts)
        self.exchanges = exchanges_tokens(experts)
        self.wrappers: list[tuple[Any, list[str], tuple[int, int] | None]] = []
        self.of_sample: list[str] | None = None  # the adapter of each, where they differ
        self.arrived = False
        self.received: Tensor | None = None  # of rows that other ranks have sent, which of the whole batch they are

    def get(self, name: str) -> ExpertLora | FlatLora | MixedLora | None:
        """The update of a parameter, read when it is asked for: a device has something to do by then.

        Raises:
            LayoutError: See `read_adapter`.
            PeftMoeCompatError: A factor is sharded, and nothing has gathered it for this forward.
        """
        loras = self._read(name)
        # Of several adapters, or of a parameter that PEFT up to 0.19 has wrapped twice: they add up, as when merged.
        if self.of_sample is not None:
            each = (_sum(loras.get(adapter, ())) for adapter in dict.fromkeys(self.of_sample))
            return layout.mix([lora and lora.canonical() for lora in each])
        return _sum([lora for of_adapter in loras.values() for lora in of_adapter])

    def _read(self, name: str, only: str | None = None) -> dict[str, list[FlatLora]]:
        """Of each adapter, or of one, what it has on a parameter."""
        loras: dict[str, list[FlatLora]] = {}
        for wrapper, adapter_names, held in self.wrappers:
            if wrapper.parameter_name != name:
                continue
            of_A, of_B = wrapper._modules["lora_A"]._modules, wrapper._modules["lora_B"]._modules
            spread = held is not None
            for adapter_name in adapter_names:
                if only is not None and only != adapter_name:
                    continue
                A, B = held_weight(of_A[adapter_name]), held_weight(of_B[adapter_name])
                if still_sharded(A, spread) or still_sharded(B, spread):
                    raise PeftMoeCompatError(
                        f"lora_A or lora_B of {name!r}, adapter {adapter_name!r}, is a DTensor in the forward: it is "
                        "read without calling the module that holds it, so its own fully_shard never gathers it. Give "
                        "fully_shard the wrapped experts module or its decoder layer, and not lora_A or lora_B."
                    )
                lora = read_adapter(wrapper, adapter_name, bool(self.is_transposed), self.rule, held)
                loras.setdefault(adapter_name, []).append(lora)
        return loras

    def drops(self) -> bool:
        """Whether a dropout is at work."""
        return any(dropout_of(wrapper, name) for wrapper, names, _ in self.wrappers for name in names)

    def places(self, index: Tensor) -> Tensor | None:
        """Which row of the whole batch each of "T k" is, where a dropout has to know that and this rank has a part."""
        if not (dist.is_available() and dist.is_initialized() and self.drops()):
            return None
        if self.received is not None:  # of no rows it is, but for one that keeps the others' backward going
            return self.received.view(index.shape) if self.received.numel() == index.numel() else None
        first = index.numel() * batch_of(getattr(self.experts, "config", None))
        return torch.arange(first, first + index.numel(), device=index.device).view(index.shape) if first else None

    def of_adapter(self, adapter_name: str) -> OfAdapter:
        return OfAdapter(lambda name: _sum(self._read(name, adapter_name).get(adapter_name, ())))

    def check_samples(self, tokens: int) -> list[str] | None:
        """The adapter of each sample, where they differ, once the samples can have as many tokens each.

        Raises:
            LayoutError: They cannot.
        """
        if self.of_sample is None:
            return None
        samples = len(self.of_sample)
        if tokens % samples:
            raise LayoutError(
                f"adapter_names has {samples} names, but {type(self.experts).__name__} gets {tokens} tokens, which "
                f"{samples} samples cannot share evenly. One name for each sample of the batch was expected."
            )
        return self.of_sample


class OfAdapter(NamedTuple):
    """What a `Handover` hands down of one adapter."""

    get: Callable[[str], ExpertLora | FlatLora | None]


def _sum(loras: Sequence[FlatLora]) -> ExpertLora | FlatLora | None:
    if len(loras) < 2:
        return loras[0] if loras else None
    return layout.concat([lora.canonical() for lora in loras])


def forward_of_samples(
    module: Any, handover: Handover, names: list[str], hidden_states: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """`experts_forward` where each of the samples, whose tokens "T H" are side by side, takes the adapter it names.

    In one pass for all of them; or a pass for each adapter, where each has tokens enough to make up for reading the
    weights again: the fused kernels have one adapter.
    """
    adapters, samples = list(dict.fromkeys(names)), len(names)
    passes = len(adapters) == 1 or hidden_states.shape[0] >= _TOKENS_OF_A_PASS * len(adapters)
    if not passes or torch.compiler.is_compiling() or not runs_fused(module, hidden_states, index):
        ids = torch.tensor([adapters.index(name) for name in names], device=hidden_states.device)
        mixed = Mixed(len(adapters), ids.repeat_interleave(hidden_states.shape[0] // samples))
        return experts_forward(module, handover, hidden_states, index, weights, mixed)
    order = sorted(range(samples), key=lambda sample: adapters.index(names[sample]))
    sizes = [names.count(adapter) * hidden_states.shape[0] // samples for adapter in adapters]
    by_adapter = (torch.split(_samples_in_order(tensor, order), sizes) for tensor in (hidden_states, index, weights))
    parts = zip(adapters, zip(*by_adapter, strict=True), strict=True)
    out = [experts_forward(module, handover.of_adapter(adapter), *part) for adapter, part in parts]
    return _samples_in_order(torch.cat(out), sorted(range(samples), key=order.__getitem__))


def _samples_in_order(tensor: Tensor, order: list[int]) -> Tensor:
    """ "T n", the tokens of one sample side by side."""
    if order == sorted(order):
        return tensor
    samples = tensor.reshape(len(order), -1, tensor.shape[1])
    return samples.index_select(0, torch.tensor(order, device=tensor.device)).flatten(0, 1)
