"""For vLLM (0.28 to 0.33): a live adapter put into a worker, in the process of that worker."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..handover import AdapterStream
from ..patching.context import in_place

__all__ = ["load_adapter"]


def load_adapter(lora_manager: Any, stream: AdapterStream, name: str = "peft_moe_compat", lora_int_id: int = 1) -> Any:
    """Has vLLM load an adapter from memory, in the place of the one that it had under this id.

    Its own `add_adapter` does it, from a folder that has the config alone. Each rank of a server that is tensor or
    expert parallel calls it with all of the adapter, and takes its part.

    Args:
        lora_manager: Of the worker: `model_runner.lora_manager`.
        stream: `adapter_tensors(model, "vllm")`.
        name, lora_int_id: Of the adapter in vLLM.

    Returns:
        The `LoRARequest` to generate with. It names no folder that vLLM could read the adapter from again.

    Raises:
        Whatever vLLM raises of an adapter that it does not take.
    """
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(stream.config), encoding="utf-8")
        from_memory = SimpleNamespace(
            from_local_checkpoint=_from_local_checkpoint(lora_manager._lora_model_cls, stream)
        )
        with in_place(lora_manager, "_lora_model_cls", from_memory):
            lora_manager.add_adapter(LoRARequest(name, lora_int_id, folder, load_inplace=True))
        return LoRARequest(name, lora_int_id, folder)


def _from_local_checkpoint(lora_model: Any, stream: AdapterStream) -> Any:
    """That of `LoRAModel`, of a stream instead."""

    def load(
        folder: str,  # noqa: ARG001
        expected_lora_modules: set[str],  # noqa: ARG001
        peft_helper: Any,
        *,
        device: str,
        dtype: Any,
        tensorizer_config_dict: Any = None,  # noqa: ARG001  # until 0.30
        moe_ep_spec: Any = None,
        **options: Any,
    ) -> Any:
        remote = _elsewhere(moe_ep_spec)
        # Copied, since vLLM scales lora_B in place.
        tensors = {n: tensor.to(device, dtype, copy=True) for n, tensor in stream if not remote(n)}
        return lora_model.from_lora_tensors(
            tensors=tensors, peft_helper=peft_helper, device=device, dtype=dtype, **options
        )

    return load


def _elsewhere(moe_ep_spec: Any) -> Callable[[str], bool]:
    """Tensor's name -> whether it is of an expert that another rank of the server holds."""
    if moe_ep_spec is None:
        return lambda _: False
    from vllm.lora.lora_model import _is_remote_expert_key

    return partial(_is_remote_expert_key, spec=moe_ep_spec)
