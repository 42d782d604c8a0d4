"""Tiny causal LMs with LoRA on experts and attention, the same in every process, and a few steps of their training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from support import zoo
from torch import Tensor, nn

# (E, out, in); and (E, in, out) with biases, whose gate and up rows are interleaved.
FAMILIES = ("qwen3_moe", "gpt_oss")
LAYERS = 2
BATCH = 4
STEPS = 3


def base_model(family: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return zoo.tiny_model(family, use_cache=False, **config)


def lora_model(family: str, **config: Any) -> Any:
    """r=3 on gate_up_proj, down_proj, q_proj and v_proj: 18 rows or columns, which 4 ranks cannot share evenly."""
    return zoo.peft_model(base_model(family, **config), target_modules=["q_proj", "v_proj"])


def decoder_layers(model: Any) -> Any:
    return model.get_base_model().model.layers


def batches(steps: int = STEPS) -> list[Tensor]:
    """One global batch of token ids, `BATCH` rows, per step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 61, (BATCH, 9), generator=generator) for _ in range(steps)]


def plain_name(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and checkpoint_wrapper put into it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the CPU."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def train(
    model: Any,
    data: list[Tensor],
    *,
    optimizer: Any = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
    microbatch: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext(),
    after_backward: Callable[[], None] = lambda: None,
    microbatches: int = 1,
) -> dict[str, Tensor]:
    """Trains on this rank's rows of each global batch; a rate high enough for a wrong step to show in the next loss.

    Args:
        model: Sharded, wrapped, or not at all.
        data: A global batch per step.
        optimizer: By default SGD, whose steps keep the round-off of a gradient what it is.
        backward: Of one loss.
        microbatch: The context of one's forward and backward, given whether it is the step's last.
        after_backward: Before each optimiser step.
        microbatches: How many parts a rank's rows are taken in.

    Returns:
        "step.loss", the mean over all ranks, and "step.<parameter>" gradients and "after.<parameter>" values, whole.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    found = {}
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        losses = []
        parts = batch.chunk(world_size)[rank].chunk(microbatches)
        for index, ids in enumerate(parts):
            with microbatch(index == len(parts) - 1):
                loss = model(input_ids=ids, labels=ids).loss / len(parts)
                backward(loss)
            losses.append(loss.detach())
        after_backward()
        found[f"{step}.loss"] = mean_over_ranks(sum(losses))
        found |= {f"{step}.{plain_name(n)}": full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return found | {f"after.{plain_name(n)}": full(p) for n, p in model.named_parameters() if p.requires_grad}


class Calls:
    """Counts the library's own expert forwards in this process, from when it is made on."""

    def __init__(self) -> None:
        from peft_moe_compat.patching import forward as patched

        self.count, forward = 0, patched.experts_forward

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self.count += 1
            return forward(*args, **kwargs)

        patched.experts_forward = counted

    def taken(self) -> int:
        """The calls since this was asked last."""
        count, self.count = self.count, 0
        return count


def outermost(layer: nn.Module) -> Any:
    """What stands in the place of a layer's experts module: PEFT's outer wrapper."""
    return layer.mlp.experts
