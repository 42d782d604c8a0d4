from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

import peft_moe_compat

# The tensors here are tiny: a second thread costs more in barriers than it computes.
torch.set_num_threads(1)
# What is allocated and never written is NaN, or the largest integer: for triton's interpreter too, and in what torch's
# own grouped products leave past the last group. Nothing that reads it goes unnoticed.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", autouse=True)
def _imported() -> Iterator[None]:
    """What has been imported by now is no garbage: torch and transformers alone take each collection half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test starts from the same random state, with the library active, and leaves it so."""
    torch.manual_seed(0)
    peft_moe_compat.activate()
    yield
    peft_moe_compat.activate()


@pytest.fixture
def stock():
    """Runs a function with PEFT and transformers as they were released."""

    def run(function, *args, **kwargs):
        peft_moe_compat.deactivate()
        try:
            return function(*args, **kwargs)
        finally:
            peft_moe_compat.activate()

    return run
