"""Bytes that each GPU receives per layer and training step, by layout, for LoRA on all experts of large models.

    python benchmarks/moved_bytes.py [--tokens 8192] [--rank 16]

Arithmetic alone: weights in bfloat16, LoRA in float32, gradient checkpointing, tokens routed evenly. FSDP2 gathers what
a layer holds for its forward and once more for its backward; tokens go to the experts' ranks and back in the forward,
its recomputation and its backward. tests/scale/test_moved_bytes.py counts them in a run.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

HOST = 8  # GPUs of one


class Model(NamedTuple):
    """One layer: H, I, experts, experts a token, and the parameters that are no experts'."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dense: int


# Qwen3-235B-A22B: 64 heads of 128, 4 of keys. DeepSeek-V3, 671B: MLA and a shared expert.
MODELS = {
    "235B": Model(4096, 1536, 128, 8, 2 * 4096 * 64 * 128 + 2 * 4096 * 4 * 128 + 128 * 4096 + 2 * 4096 + 2 * 128),
    "671B": Model(
        7168, 2048, 256, 8,
        7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168 + 3 * 7168 * 2048 + 256 * 7168,
    ),
}  # fmt: skip


class Moved(NamedTuple):
    """Bytes received, by what they are; the experts' LoRA gathered and its gradients reduced."""

    dense: float
    experts: float
    lora: float
    tokens: float


def moved(
    model: Model, ranks: int, ep: int, tokens: int, rank: int, checkpointing: bool = True, beyond: int = 1
) -> Moved:
    """Of one layer in one step, of a rank.

    Args:
        ranks: `fsdp_size`, without tensor parallelism.
        ep: `ep_size`.
        tokens: Of a rank.
        rank: r, of the LoRA on both projections of every expert.
        beyond: Counts only what comes from ranks that are not of one's own `beyond` neighbours: 8, other hosts.
    """

    def from_others(group: int, stride: int) -> float:
        return 1 - max(min(beyond // stride, group), 1) / group

    weights = 3 * model.hidden * model.intermediate * model.experts * 2 / ep
    factors = rank * (2 * model.hidden + 3 * model.intermediate) * model.experts * 4 / ep
    same_experts = from_others(ranks // ep, ep)
    rows = tokens * model.top_k * model.hidden * 2
    return Moved(
        dense=2 * model.dense * 2 * from_others(ranks, 1),
        experts=2 * weights * same_experts,
        lora=3 * factors * same_experts,
        tokens=(6 if checkpointing else 4) * rows * from_others(ep, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    print("| model | GPUs | layout | dense | experts | LoRA | tokens | MiB in all | from other hosts |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, model in MODELS.items():
        for ranks in (8, 64, 512):
            for ep in (1, 8, 64):
                if ep > ranks:
                    continue
                found = moved(model, ranks, ep, args.tokens, args.rank)
                other = moved(model, ranks, ep, args.tokens, args.rank, beyond=HOST)
                layout = f"fsdp {ranks}" + (f", ep {ep}" if ep > 1 else "")
                cells = [*found, sum(found), sum(other)]
                print(f"| {name} | {ranks} | {layout} | " + " | ".join(f"{cell / 2**20:,.0f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
