"""What a run does with its experts: the tokens they get, the gradients of their LoRA, and the size of their updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import layout
from .errors import AdapterError, ParallelismError
from .model.sharding import local_experts, local_factors, whole
from .patching.matching import chains

__all__ = ["ExpertReadings", "Reading"]


@dataclass(frozen=True)
class Reading:
    """One experts module, or one expert parameter of it.

    Attributes:
        module: Its path.
        parameter: The parameter's name; None where tokens are counted, which is of the module.
        tokens: Routed to each expert since the last reading; None of a parameter, before the first forward, and of a
            class that is not called with the routing.
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
    Under FSDP2 reading is a collective operation: every rank reads, and gets all.

    Make it before `torch.compile`. Gradients are read where they are: after the backward, before they are cleared.

    Args:
        model: With LoRA on experts.
        adapter_name: Of the adapter to read.

    Raises:
        AdapterError: No experts of the model have an adapter of that name.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        self._adapter = adapter_name
        # PEFT counts one expert in a parameter that is no stack.
        self._chains = {path: chain for path, chain in chains(model).items() if chain[0].num_experts > 1}
        names = sorted({name for chain in self._chains.values() for wrapper in chain for name in wrapper.lora_A})
        if adapter_name not in names:
            raise AdapterError(f"No experts of the model have an adapter {adapter_name!r}; they have {names}.")
        self._counts: dict[str, Tensor] = {}
        self._hooks = [
            chain[0].register_forward_pre_hook(self._counting(path, chain[0].num_experts), with_kwargs=True)
            for path, chain in self._chains.items()
        ]

    def _counting(self, path: str, num_experts: int) -> Any:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = next((x for x in (*args, *kwargs.values()) if _is_index(x)), None)
            # In a backward it is recomputed; a compiled graph is asked only once, and not then.
            if index is None or (not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1):
                return
            if path not in self._counts:
                # One more for what is routed to the experts of other ranks.
                with torch.inference_mode(False):  # a first forward in it counts in training too
                    self._counts[path] = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
            flat = index.detach().reshape(-1).clamp(max=num_experts)
            self._counts[path].scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))

        return count

    def read(self) -> list[Reading]:
        """A reading of every experts module, and one of each of its parameters; the tokens are counted anew then."""
        found = []
        for path, chain in self._chains.items():
            counts = self._counts.get(path)
            found.append(Reading(path, None, None if counts is None else tuple(counts[:-1].tolist())))
            if counts is not None:
                counts.zero_()
            found += [self._of(path, wrapper) for wrapper in reversed(chain) if self._adapter in wrapper.lora_A]
        return found

    def numbers(self) -> dict[str, float]:
        """`read`, in numbers that a logger takes.

        Per module `experts/PATH/tokens_max` and `tokens_min`, shares of the mean; per parameter
        `experts/PATH.PARAMETER/update_mean`, `update_max` and, where there are gradients, `without_gradient`, the
        number of experts whose gradient is zero. All of them are floats.
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
                found[f"{name}/without_gradient"] = float(sum(norm == 0 for norm in reading.gradients))
        return found

    def remove(self) -> None:
        """Takes the hooks away; what has been counted can still be read."""
        for hook in self._hooks:
            hook.remove()

    def _of(self, path: str, wrapper: Any) -> Reading:
        held = local_experts(wrapper.get_base_layer(), wrapper.parameter_name)
        num_experts = wrapper.num_experts if held is None else held[1] - held[0]

        def by_expert(A: Tensor, B: Tensor) -> layout.ExpertLora:
            """Sides exchanged where the layout is the reversed one, which no norm sees."""
            A, B = (_here(tensor, held is not None).detach().float() for tensor in (A, B))
            return layout.flat(A, B, num_experts, orientation="linear", scaling=1.0).canonical()

        weights = [getattr(wrapper, factor)[self._adapter].weight for factor in ("lora_A", "lora_B")]
        norms = None
        if all(weight.grad is not None for weight in weights):
            grads = by_expert(*(weight.grad for weight in weights))
            norms = tuple((grads.A.square().sum((1, 2)) + grads.B.square().sum((1, 2))).sqrt().tolist())
        lora = by_expert(*weights)
        # ||B A||^2 is the sum of the products of their Gram matrices.
        squares = ((lora.A @ lora.A.mT) * (lora.B.mT @ lora.B)).sum((1, 2)).clamp(min=0)
        updates = (squares.sqrt() * abs(wrapper.scaling[self._adapter])).tolist()
        return Reading(path, wrapper.parameter_name, gradients=norms, updates=tuple(updates))


def _is_index(value: Any) -> bool:
    """Of the experts that each token goes to, "T k"; numbers of tokens, which aria's older class is given, are "E"."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int64, torch.int32)


def _here(tensor: Tensor, spread_by_expert: bool) -> Tensor:
    """What this rank holds of experts that are spread over ranks, else the whole."""
    if hasattr(tensor, "ds_id"):
        raise ParallelismError(
            "The LoRA is partitioned by ZeRO-3. Read within deepspeed.zero.GatheredParameters([p for p in "
            "model.parameters() if p.requires_grad])."
        )
    return local_factors(tensor) if spread_by_expert else whole(tensor)
