"""For TRL's trainers with `use_vllm=True`: vLLM gets the adapter after every step, in place of the merged model.

TRL (1.16, `VLLMGeneration.sync_weights`) merges the adapter into the model, sends every parameter, and takes the
adapter out again, which in bfloat16 leaves the weights changed. It has no hook for anything else.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from trl.generation import vllm_generation

from ..errors import AdapterError
from ..handover import adapter_tensors, save_adapter
from ..patching.context import in_place
from .vllm import load_adapter

__all__ = ["adapter_in_vllm"]

_NAME = "peft_moe_compat"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # LoRAConfig.max_lora_rank, vLLM 0.28 to 0.33


@contextmanager
def adapter_in_vllm(folder: str | Path | None = None) -> Iterator[None]:
    """TRL's trainers that are made in this block hand their adapter over to vLLM before they generate.

    With `vllm_mode="colocate"` the engine is made with `enable_lora`, its worker takes the tensors from memory, and
    it sleeps at level 1, since the base's weights are not sent again.

    With `vllm_mode="server"` the adapter is written to `folder`, and the server loads it. Start the server with
    `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`, `--enable-lora` and `--max-lora-rank`, beside what TRL asks for.

    Args:
        folder: Of server mode: where the server finds files of this process, best in memory (`/dev/shm`). It holds the
            adapter of the last step.

    Raises:
        AdapterError: Where the trainer is made: vLLM takes no such adapter, or server mode has no `folder`.

    Example: `with adapter_in_vllm(): trainer = GRPOTrainer(model, reward, GRPOConfig(use_vllm=True), ...)`
    """
    stock = vllm_generation.VLLMGeneration._init_vllm

    def init(self: Any) -> None:
        self.__class__ = _AdapterGeneration
        self.begin(stock, folder)

    with in_place(vllm_generation.VLLMGeneration, "_init_vllm", init):
        yield


class _AdapterGeneration(vllm_generation.VLLMGeneration):  # type: ignore[misc]  # Any to mypy
    """TRL's generation with another `sync_weights`."""

    def begin(self, init: Any, folder: str | Path | None) -> None:
        config = adapter_tensors(self.model, "vllm").config  # what vLLM does not take is refused here
        if self.mode == "server":
            if folder is None:
                raise AdapterError(
                    "vLLM in server mode loads an adapter from a folder; pass one that both see: "
                    "adapter_in_vllm('/dev/shm/adapter')."
                )
            # Of this trainer alone, whatever others write there; only the first process's name counts.
            self._folder, self._own, self._written = Path(folder).resolve(), f"{_NAME}-{uuid4().hex[:12]}", 0
            init(self)
            return
        rank = max([config["r"], *config.get("rank_pattern", {}).values()])
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": next((n for n in _RANKS if n >= rank), rank)}
        made = vllm_generation.LLM
        with in_place(vllm_generation, "LLM", lambda **options: _Engine(made(**options, **lora))):
            init(self)

    def sync_weights(self) -> None:
        """Hands the adapter over as it is now. Every process calls it."""
        if self.mode == "server":
            self._load_in_server()
            return
        if self.enable_sleep_mode:
            vllm_generation.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        self.llm.request = load_adapter(runner.lora_manager, adapter_tensors(self.model, "vllm"), _NAME)
        self.llm.reset_prefix_cache()

    def _load_in_server(self) -> None:
        # In a folder of its own: vLLM may know the last one's results by its path.
        last, out = (self._folder / f"{self._own}-{self._written + n}" for n in (0, 1))
        main = self.accelerator.is_main_process
        if main:
            self._folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.model, out, "vllm")
        self._written += 1
        if not main:
            return
        client = self.vllm_client
        wanted = {"lora_name": _NAME, "lora_path": str(out), "load_inplace": True}
        answer = client.session.post(f"{client.base_url}/v1/load_lora_adapter", json=wanted)
        if answer.status_code != 200:
            raise AdapterError(
                f"The vLLM server at {client.base_url} did not load the adapter: {answer.status_code}, "
                f"{answer.text[:300]}. It has to see {out}, and needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, "
                "--enable-lora and a --max-lora-rank that is large enough."
            )
        client.model = _NAME
        client.reset_prefix_cache()
        shutil.rmtree(last, ignore_errors=True)  # there is none before the first


class _Engine:
    """vLLM's LLM, whose prompts go to the adapter."""

    def __init__(self, llm: Any) -> None:
        self._llm, self.request = llm, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompts: Any, **options: Any) -> Any:
        return self._llm.generate(prompts, lora_request=self.request, **options)

    def sleep(self, level: int = 1) -> None:  # noqa: ARG002
        """At level 2 the base's weights would be lost."""
        self._llm.sleep(level=1)
