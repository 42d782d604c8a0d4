"""The harness itself: a failing rank, or one that hangs, ends the test."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from .ranks import run


def _sum():
    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value)
    return value.item()


def _one_fails():
    if dist.get_rank() == 1:
        raise ArithmeticError("of rank 1")
    dist.barrier()


def _one_hangs():
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def test_every_rank_returns():
    assert run(2, _sum) == [3.0, 3.0]


def test_a_failing_rank_ends_the_run():
    with pytest.raises(ProcessRaisedException, match="of rank 1"):
        run(2, _one_fails)


def test_a_hanging_rank_ends_the_run():
    with pytest.raises((TimeoutError, ProcessRaisedException)):
        run(2, _one_hangs, timeout=10)
