"""The test of the data for lora_B's packing: clear on trained adapters, silent on untrained ones, never wrong."""

from __future__ import annotations

import pytest
import torch
from support.adapter_files import Spec, flat, save_fused

from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.packing import packing_evidence as packing_of
from peft_moe_compat.layout import PACKINGS


def lora_B(seed: int, packing: str, spread: float, E: int = 16, r: int = 8, ranks: float = 0.0) -> torch.Tensor:
    """Columns whose log norms vary by `spread` between experts and by `ranks` between the ranks of all experts."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(E, 32, r, generator=generator)
    by_expert = (spread * torch.randn(E, 1, 1, generator=generator)).exp()
    by_rank = (ranks * torch.randn(1, 1, r, generator=generator)).exp()
    return flat(torch.zeros(E, r, 4), B * by_expert * by_rank, "linear", packing)[1]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("E", "r"), [(8, 4), (16, 8), (64, 4)])
def test_it_is_clear_where_experts_differ(packing, E, r):
    found = [packing_of([(lora_B(4 * s + i, packing, 0.5, E, r), E) for i in range(4)]).packing for s in range(40)]
    assert set(found) <= {packing, None}
    assert found.count(packing) >= 36


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("spread", "ranks"), [(0.0, 0.0), (0.02, 0.0), (0.05, 0.0), (0.2, 0.0)])
@pytest.mark.parametrize(("E", "r"), [(4, 2), (8, 8), (16, 4), (4, 16)])
def test_it_is_never_fooled(packing, spread, ranks, E, r):
    for seed in range(60):
        found = packing_of([(lora_B(seed, packing, spread, E, r, ranks), E)])
        assert found.packing in (packing, None), (seed, found)
        if not spread:
            assert found.packing is None, (seed, found)


@pytest.mark.parametrize("packing", PACKINGS)
def test_it_says_nothing_of_one_expert_rank_one_or_zeros(packing):
    assert packing_of([(lora_B(0, packing, 1.0, E=1), 1), (lora_B(0, packing, 1.0, r=1), 16)]).packing is None
    assert packing_of([(torch.zeros(8, 64), 16)]).packing is None
    assert packing_of([]).packing is None


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_unmarked_file_is_read_by_its_data_alone(tmp_path, packing):
    spec = Spec(E=16, r=4)
    factors = spec.factors(("gate_up", "down"))
    strength = torch.linspace(-1.5, 1.5, 16).exp()[torch.randperm(16)].view(16, 1, 1)
    trained = {key: (A, B * strength) for key, (A, B) in factors.items()}
    found = inspect_adapter(save_fused(tmp_path / "trained", spec, trained, packing=packing))
    assert (found.packing.value, found.packing.confidence) == (packing, "likely")
    found = inspect_adapter(save_fused(tmp_path / "fresh", spec, factors, packing=packing))
    assert (found.packing.value, found.packing.remedy) == (None, "--packing rank_major, or --packing grouped")
    zero = {key: (A, B * 0) for key, (A, B) in factors.items()}
    assert inspect_adapter(save_fused(tmp_path / "zero", spec, zero, packing=packing)).packing.value == "either"


def test_data_against_the_stated_packing_is_refused(tmp_path):
    spec = Spec(E=16, r=4)
    strength = torch.linspace(-1.5, 1.5, 16).exp()[torch.randperm(16)].view(16, 1, 1)
    factors = {key: (A, B * strength) for key, (A, B) in spec.factors(("gate_up", "down")).items()}
    source = save_fused(tmp_path / "in", spec, factors, packing="grouped", peft_version="0.21.2")
    found = inspect_adapter(source)
    assert not found.packing.decided
    assert found.packing.evidence[-1].code == "data_against"
    assert inspect_adapter(source, packing="grouped").packing.value == "grouped"


def joined(seed: int, packing: str, spread: float, E: int, r: int, ratio: float) -> torch.Tensor:
    """As `lora_B`, with gate and up joined block-diagonally: half of the ranks are larger in every expert."""
    order = [(e, j) for j in range(r) for e in range(E)] if packing == "rank_major" else None
    order = order or [(e, j) for e in range(E) for j in range(r)]
    factor = torch.tensor([ratio if j >= r // 2 else 1.0 for _, j in order])
    return lora_B(seed, packing, spread, E, r) * factor


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ratio", [1.5, 2, 4])
@pytest.mark.parametrize(("E", "r"), [(8, 8), (16, 16), (64, 16), (8, 16)])
def test_ranks_that_differ_alike_in_all_experts_do_not_fool_it(packing, ratio, E, r):
    for seed in range(20):
        for spread in (0, 0.1, 0.3, 0.6, 1.0):
            assert packing_of([(joined(seed, packing, spread, E, r, ratio), E)]).packing in (packing, None)


@pytest.mark.parametrize("packing", PACKINGS)
def test_with_as_many_ranks_as_experts_only_a_hint_remains(packing):
    found = packing_of([(lora_B(0, packing, 1.0, 8, 8), 8)])
    assert (found.packing, found.hint) == (None, packing)
    assert found.evidence.code == "data_or_ranks"
