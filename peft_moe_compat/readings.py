"""What a run does with its experts: the tokens they get, the gradients of their LoRA, and the size of their updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .patching.matching import chains

__all__ = ["ExpertReadings", "Reading"]


@dataclass(frozen=True)
class Reading:
    """One experts module, or one expert parameter of it.

    Attributes:
        module: Its path.
        parameter: The parameter's name; None where tokens are counted, which is of the module.
        tokens: Routed to each expert since the last reading; None of a parameter, and of a class that is not told.
        gradients: Norm of each expert's gradient, lora_A and lora_B together; None where there is none at the moment.
        updates: Frobenius norm of each expert's update, `scaling * B @ A`; None of a module.
    """

    module: str
    parameter: str | None
    tokens: tuple[int, ...] | None = None
    gradients: tuple[float, ...] | None = None
    updates: tuple[float, ...] | None = None


class ExpertReadings:
    """Reads, when asked, what the experts of a model with LoRA have done. Costs nothing unless one is made.

    Tokens are counted on the device, from the routing that the experts are called with, and never fetched before they
    are asked for; a forward that gradient checkpointing repeats counts once. All else is computed when it is asked for.
    Under expert parallelism the numbers are of the experts that this rank holds, the tokens of all that it routes.

    Make it before `torch.compile`. Gradients are read where they are: after the backward, before they are cleared.

    Args:
        model: With LoRA on experts.
        adapter_name: Of the adapter to read.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        self._adapter = adapter_name
        # PEFT counts one expert in a parameter that is no stack.
        self._chains = {path: chain for path, chain in chains(model).items() if chain[0].num_experts > 1}
        self._counts: dict[str, Tensor] = {}
        self._hooks = [
            chain[0].register_forward_pre_hook(self._counting(path, chain[0].num_experts), with_kwargs=True)
            for path, chain in self._chains.items()
        ]

    def _counting(self, path: str, num_experts: int) -> Any:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = next((x for x in (*args, *kwargs.values()) if _is_index(x)), None)
            if index is None or torch._C._current_graph_task_id() != -1:  # in a backward: recomputed
                return
            if path not in self._counts:
                # One more for what is routed to the experts of other ranks.
                self._counts[path] = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
            flat = index.detach().reshape(-1).clamp(max=num_experts)
            self._counts[path].scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))

        return count

    def read(self) -> list[Reading]:
        """A reading of every experts module, and one of each of its parameters; the tokens are counted anew then."""
        found = []
        for path, chain in self._chains.items():
            counts = self._counts.pop(path, None)
            tokens = None if counts is None else tuple(counts[:-1].tolist())
            found.append(Reading(path, None, tokens))
            found += [self._of(path, wrapper) for wrapper in reversed(chain) if self._adapter in wrapper.lora_A]
        return found

    def numbers(self) -> dict[str, float]:
        """`read`, in numbers that a logger takes.

        Per module `experts/PATH/tokens_max` and `tokens_min`, shares of the mean; per parameter
        `experts/PATH.PARAMETER/update_mean`, `update_max` and, where there are gradients, `without_gradient`, the
        number of experts whose gradient is zero.
        """
        found: dict[str, float] = {}
        for reading in self.read():
            name = f"experts/{reading.module}" + (f".{reading.parameter}" if reading.parameter else "")
            if reading.tokens and (mean := sum(reading.tokens) / len(reading.tokens)):
                found[f"{name}/tokens_max"] = max(reading.tokens) / mean
                found[f"{name}/tokens_min"] = min(reading.tokens) / mean
            if reading.updates:
                found[f"{name}/update_mean"] = sum(reading.updates) / len(reading.updates)
                found[f"{name}/update_max"] = max(reading.updates)
            if reading.gradients:
                found[f"{name}/without_gradient"] = sum(norm == 0 for norm in reading.gradients)
        return found

    def remove(self) -> None:
        """Takes the hooks away; what has been counted can still be read."""
        for hook in self._hooks:
            hook.remove()

    def _of(self, path: str, wrapper: Any) -> Reading:
        of_A, of_B = (_local(getattr(wrapper, factor)[self._adapter].weight) for factor in ("lora_A", "lora_B"))
        rank, norms = wrapper.r[self._adapter], None
        if of_A.grad is not None and of_B.grad is not None:
            A, B = _by_expert(of_A.grad, of_B.grad, rank)
            norms = tuple((A.square().sum((1, 2)) + B.square().sum((1, 2))).sqrt().tolist())
        A, B = _by_expert(of_A, of_B, rank)
        # ||B A||^2 is the sum of the products of their Gram matrices, whichever of the two holds the in-features.
        squares = ((A @ A.mT) * (B.mT @ B)).sum((1, 2)).clamp(min=0)
        updates = (squares.sqrt() * abs(wrapper.scaling[self._adapter])).tolist()
        return Reading(path, wrapper.parameter_name, gradients=norms, updates=tuple(updates))


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _local(weight: Tensor) -> Tensor:
    """This rank's part of a DTensor, its gradient with it."""
    if not hasattr(weight, "to_local"):
        return weight
    local: Tensor = weight.detach().to_local()  # type: ignore[attr-defined]
    local.grad = None if weight.grad is None else weight.grad.to_local()  # type: ignore[attr-defined]
    return local


def _by_expert(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """ "(E r) p" and "q (r E)" in float32, as "E r p" and "E q r"."""
    A, B = A.detach().float(), B.detach().float()
    return A.view(-1, rank, A.shape[1]), B.view(B.shape[0], rank, -1).permute(2, 0, 1)
