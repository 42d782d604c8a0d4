"""How the columns of a fused lora_B are packed: `(r E)` or `(E r)`. Shapes never show it.

In a trained adapter, experts differ in how much they were updated: they saw different tokens. So the norms of lora_B's
columns vary between experts more than between the ranks of one expert. Grouping the columns by expert under both
packings, only the right one shows that: an F test on the log norms, pooled over the file's matrices.

Ranks that differ alike in all experts look just so under the wrong packing (gate and up joined block-diagonally are
such: the first half of the ranks is gate's). So the winner must also leave less unexplained than experts and ranks
together do under the other packing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor

from ..layout import PACKINGS
from .conclusions import Evidence

__all__ = ["PackingTest", "packing_evidence"]

# Standard deviations of log F that the winner must clear, and the share of the winner's that the loser may reach.
_CLEAR, _LOSER_SHARE = 5.0, 0.5


@dataclass(frozen=True)
class PackingTest:
    """Outcome of the test on the data.

    Attributes:
        packing: The packing the data shows, None where it shows none clearly.
        evidence: The figures behind it.
        hint: The packing the data speak for, though something else might explain them: too little to conclude from,
            enough to doubt another one.
    """

    packing: str | None
    evidence: Evidence
    hint: str | None = None


def packing_evidence(matrices: Iterable[tuple[Tensor, int]]) -> PackingTest:
    """The packing that lora_B's column norms speak for.

    Args:
        matrices: (lora_B "q (r E)" or "q (E r)", E) pairs; those with one expert or rank 1 say nothing.
    """
    between = dict.fromkeys(PACKINGS, 0.0)
    within = dict.fromkeys(PACKINGS, 0.0)
    unexplained = dict.fromkeys(PACKINGS, 0.0)
    df_between = df_within = df_unexplained = 0
    seen = 0
    for lora_B, num_experts in matrices:
        rank = lora_B.shape[1] // num_experts
        wide = lora_B.float() if lora_B.dtype.itemsize == 1 else lora_B
        norms = torch.linalg.vector_norm(wide, dim=0, dtype=torch.float64)
        if num_experts < 2 or rank < 2 or not norms.gt(0).all():
            continue
        seen += 1
        df_between += num_experts - 1
        df_within += num_experts * (rank - 1)
        df_unexplained += (num_experts - 1) * (rank - 1)
        logs = norms.log()
        logs = (logs - logs.mean()) / logs.std().clamp(min=1e-12)
        for packing in PACKINGS:
            by_expert = logs.view(rank, num_experts).T if packing == "rank_major" else logs.view(num_experts, rank)
            means = by_expert.mean(1, keepdim=True)
            between[packing] += float(rank * means.square().sum())
            within[packing] += float((by_expert - means).square().sum())
            unexplained[packing] += float((by_expert - means - by_expert.mean(0, keepdim=True)).square().sum())
    if not seen:
        return PackingTest(None, Evidence("data_silent"))
    noise = sqrt(2 / df_between + 2 / df_within)
    scores = {
        packing: log(max(between[packing] / df_between, 1e-12) / max(within[packing] / df_within, 1e-12)) / noise
        for packing in PACKINGS
    }
    best, other = sorted(PACKINGS, key=lambda packing: -scores[packing])
    lead = log(max(unexplained[other] / df_unexplained, 1e-12) / max(within[best] / df_within, 1e-12))
    figures = {"best": scores[best], "packing": best, "worst": scores[other], "other": other, "matrices": seen}
    data = Evidence("data", figures)
    clear = scores[best] > _CLEAR and scores[other] < _LOSER_SHARE * scores[best]
    if clear and lead < _CLEAR * sqrt(2 / df_unexplained + 2 / df_within):
        return PackingTest(None, Evidence("data_or_ranks", {"data": data, "other": other}), best)
    return PackingTest(best, data, best) if clear else PackingTest(None, Evidence("data_unclear", {"data": data}))
