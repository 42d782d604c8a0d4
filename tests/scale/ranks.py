"""A function run by several processes of one gloo group, on the loopback interface alone."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import current_process, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run"]

_GROUP_TIMEOUT = timedelta(minutes=5)
# Imported once, by the process that every rank is a fork of; longer to import than any rank runs.
_PRELOADED = ["accelerate", "peft", "peft_moe_compat", "scale.models", "torch._dynamo", "torch.distributed.fsdp"]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in conftest: unwritten memory is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # accelerate asks, and uses the group that is there
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=_GROUP_TIMEOUT)
    torch.manual_seed(0)
    result = function(*arguments)
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
    atexit._run_exitfuncs()  # coverage writes what it measured then, and a fork of the server exits without


def _start_server() -> None:
    """Starts what the ranks fork from, if it does not run: it uses no threads, and has its own copy of `os.environ`."""
    mp.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    # Python before 3.13 does not give the server the sys.path that pytest made, and passes over failing imports.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


# In pytest alone, and so early that the imports run beside its own on a second core.
if current_process().name == "MainProcess":
    _start_server()


def run(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600) -> list[Any]:
    """What `function(*arguments)` returned on every rank, in their order.

    The first rank that fails ends the others and raises here with its traceback; so does the time limit.

    Args:
        function: At the top level of a module, so that a new process can import it. It finds the group initialised.
        timeout: Seconds for all of it.
    """
    _start_server()
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, (world_size, folder, function, arguments), nprocs=world_size, join=False, start_method="forkserver"
        )
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} did not end on {world_size} ranks within {timeout} s")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]
