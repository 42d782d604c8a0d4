"""A function run by several processes of one gloo group, on the loopback interface alone."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run"]

_GROUP_TIMEOUT = timedelta(seconds=60)


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=_GROUP_TIMEOUT)
    torch.manual_seed(0)
    result = function(*arguments)
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def run(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 180) -> list[Any]:
    """What `function(*arguments)` returned on every rank, in their order.

    The first rank that fails ends the others and raises here with its traceback; so does the time limit.

    Args:
        function: At the top level of a module, so that a new process can import it. It finds the group initialised.
        timeout: Seconds for all of it.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, (world_size, folder, function, arguments), nprocs=world_size, join=False, start_method="spawn"
        )
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} did not end on {world_size} ranks within {timeout} s")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]
