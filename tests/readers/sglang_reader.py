"""What SGLang applies of a LoRA folder on MoE experts, by SGLang's own code on the CPU.

Real, executed from the fetched sources: `LoRAManager` whole (its `__init__`, `_load_lora_adapter`, `init_lora_shapes`,
`init_lora_modules`, `fetch_new_loras`, `update_lora_info`), `LoRAConfig`, `LoRAAdapter` with all its normalising,
`LoRAMemoryPool`, `lora/utils.py`, `FusedMoEWithLoRA`, `_add_lora_gate_up_delta` and `_add_lora_down_delta` (which slice
the buffers for the kernel), `get_layer_id`, and of each model class `get_hidden_dim`, `get_stacked_multiply`,
`should_apply_lora` and `supported_lora_modules`.

Test doubles: the model is a tree of empty modules with the names of SGLang's own tree (`_model`), `FusedMoE` holds
sizes only (`_Experts`), `DefaultModelLoader._get_weights_iterator` reads the folder's safetensors, the kernel
`fused_moe_lora` is B @ A of the slices it is handed (`_kernel`), and the pool's dtype is float64 instead of the
model's. SGLang multiplies lora_B with the scaling in the file's dtype, so the result is exact to that only.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_moe_compat import AdapterStream

from .fetch import releases
from .stubs import ModelFile, Package, Placeholder

__all__ = ["RELEASES", "read"]

RELEASES = releases("sglang")
_MEMBERS = (
    "supported_lora_modules",
    "get_hidden_dim",
    "get_stacked_multiply",
    "should_apply_lora",
    "_lora_pattern",
    "_lora_pattern_moe",
    "lora_pattern",
)
_REAL = (
    "sglang.srt.lora.lora",
    "sglang.srt.lora.lora_config",
    "sglang.srt.lora.lora_manager",
    "sglang.srt.lora.lora_moe_runners",
    "sglang.srt.lora.mem_pool",
    "sglang.srt.lora.layers",
    "sglang.srt.lora.utils",
    "sglang.srt.lora.eviction_policy",
    "sglang.srt.layers.utils.common",
)
# Where SGLang mounts the experts below `layers.{i}` if not at `mlp.experts`: attribute names in models/*.py (0.5.23).
_EXPERTS = {
    "mixtral": "block_sparse_moe.experts",
    "phimoe": "block_sparse_moe.experts",
    "granitemoe": "block_sparse_moe.experts",
    "minimax_m2": "block_sparse_moe.experts",
    "nemotron_h": "mixer.experts",
    "llama4": "feed_forward.experts",
    "mllama4": "feed_forward.experts",
}


class _Experts(nn.Module):
    """Double of `FusedMoE`: sizes, and what `FusedMoEWithLoRA.__init__` asks for."""

    is_shared_fused_moe = False

    def __init__(
        self, num_experts: int, intermediate: int, gated: bool, interleaved: bool, rank: int, size: int
    ) -> None:
        super().__init__()
        alpha = 1.702 if interleaved else None  # models/gpt_oss.py passes gemm1_alpha; others do not
        self.moe_runner_config = SimpleNamespace(is_gated=gated, gemm1_alpha=alpha, inplace=True)
        self.quant_method, self.dispatcher, self.runner = Placeholder(), Placeholder(), None
        self.num_experts = self.num_local_experts = num_experts
        self.should_fuse_routed_scaling_factor_in_topk = False
        self.moe_tp_size, self.moe_tp_rank = size, rank
        self.intermediate_size_per_partition = intermediate // size


class _Backend:
    """Double of `BaseLoRABackend`: no kernels."""

    name, supports_dp_attention = "triton", False

    def __init__(self, **kwargs: object) -> None:
        pass

    def validate_lora_targets(self, **kwargs: object) -> None:
        pass


class _Loader:
    """Double of `DefaultModelLoader`: the tensors of the folder's safetensors files."""

    Source = staticmethod(lambda path, **kwargs: path)

    def __init__(self, config: object) -> None:
        pass

    def _get_weights_iterator(self, path: str) -> Iterator[tuple[str, Tensor]]:
        for file in sorted(Path(path).glob("*.safetensors")):
            yield from load_file(file).items()


def _kernel(*, output: Tensor, lora_a_stacked: list[Tensor], lora_b_stacked: list[Tensor], **kwargs: object) -> None:
    """Double of `fused_moe_lora`: the slices' B @ A of slot `output.slot`, joined along out: "E out in"."""
    slot = output.slot  # type: ignore[attr-defined]
    output.update = torch.cat(  # type: ignore[attr-defined]
        [b[slot] @ a[slot] for a, b in zip(lora_a_stacked, lora_b_stacked, strict=True)], dim=1
    )


def _sources(release: str) -> Path:
    return Path(os.environ["PEFT_MOE_COMPAT_READERS"]) / f"sglang-{release}"


# `get_lora()` of newer releases, `server_args` of older ones: the defaults of the flags that LoRAManager reads.
_SETTINGS = SimpleNamespace(
    enable_lora_overlap_loading=False,
    lora_eviction_policy="lru",
    experts_shared_outer_loras=None,
    lora_use_virtual_experts=False,
    lora_strict_loading=False,
    enable_dp_attention=False,
    enable_dp_lm_head=False,
    speculative_algorithm=None,
)


@functools.cache
def _package(sources: Path, rank: int, size: int) -> Package:
    sizes = dict.fromkeys(("attn_cp_size", "moe_ep_size"), 1)
    sizes |= dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), size)
    ranks = {"moe_ep_rank": 0, "tp_rank": rank, "moe_tp_rank": rank}
    one = SimpleNamespace(
        **sizes, **ranks, attn_dp_enabled=False, enable_dp_attention=False, dcp_replicate_q_proj=False
    )
    return Package(
        sources,
        "sglang",
        _REAL,
        reexports={"sglang.srt.layers.utils": ("sglang.srt.layers.utils.common",)},
        doubles={
            ("sglang.srt.runtime_context", "get_parallel"): lambda: one,
            ("sglang.srt.runtime_context", "get_lora"): lambda: _SETTINGS,
            ("sglang.srt.runtime_context", "get_spec"): lambda: SimpleNamespace(speculative_algorithm=None),
            ("sglang.srt.layers.moe.fused_moe_triton.layer", "FusedMoE"): _Experts,
            ("sglang.srt.lora.backend.lora_registry", "get_backend_from_name"): lambda name: _Backend,
            ("sglang.srt.model_loader.loader", "DefaultModelLoader"): _Loader,
            ("sglang.srt.utils", "replace_submodule"): _replace_submodule,
            ("sglang.srt.utils", "get_available_gpu_memory"): lambda *args: 0.0,
            ("sglang.srt.utils", "is_pin_memory_available"): lambda: False,
            ("sglang.srt.managers.io_struct", "LoRAUpdateOutput"): SimpleNamespace,
            ("sglang.srt.distributed", "divide"): lambda numerator, denominator: numerator // denominator,
            ("sglang.kernels.ops.lora.moe.fused_moe_lora_kernel", "fused_moe_lora"): _kernel,
            # Tile sizes of the kernel that is not there.
            ("sglang.srt.lora.lora_moe_runners", "_get_moe_lora_block_config"): lambda rank: Placeholder(),
        },
    )


def _replace_submodule(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Double of `replace_submodule` of utils/common.py (0.5.23)."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return module


def _model_file(sources: Path, architecture: str) -> ModelFile:
    for path in sorted((sources / "sglang" / "srt" / "models").glob("*.py")):
        if re.search(rf"^class {architecture}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            return ModelFile(path, _MEMBERS, {"re": re, "torch": torch})
    raise NotImplementedError(f"SGLang has no model file for {architecture}.")


def _language_model(file: ModelFile, name: str) -> type:
    try:
        return file.resolve(name)
    except KeyError:
        return object


def _model(file: ModelFile, architecture: str, hf_config: Any, rank: int, size: int) -> nn.Module:
    """Double of the model: SGLang's module names, the real class members."""
    text = hf_config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")  # LoRAMemoryPool._get_num_experts (0.5.23)
    num_experts = next(getattr(text, name) for name in names if getattr(text, name, None))
    intermediate = int(getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
    model = type(architecture, (file.resolve(architecture), nn.Module), {})()
    nn.Module.__init__(model)
    model.config = text
    inner = re.search(rf"^class {architecture}\b.*?language_model_cls=(\w+)", file.text, re.MULTILINE | re.DOTALL)
    model.model = nn.Module()
    if inner:  # the wrapper of a multimodal model hands get_hidden_dim on to its language model
        model.model = type("LanguageModel", (_language_model(file, inner[1]), nn.Module), {})()
        nn.Module.__init__(model.model)
        model.model.config = text
    model.model.device_probe = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
    prefix = "language_model.model" if file.path.stem == "mllama4" else "model"
    kinds = getattr(text, "layers_block_type", None) or ["moe"] * text.num_hidden_layers
    for layer in (i for i, kind in enumerate(kinds) if kind == "moe"):
        owner: nn.Module = model
        *path, leaf = f"{prefix}.layers.{layer}.{_EXPERTS.get(file.path.stem, 'mlp.experts')}".split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        gated, interleaved = file.path.stem != "nemotron_h", file.path.stem == "gpt_oss"
        owner.add_module(leaf, _Experts(num_experts, intermediate, gated, interleaved, rank, size))
    return model


def read(
    adapter: Path | Iterable[AdapterStream],
    base_config: Mapping[str, Any],
    *,
    release: str = RELEASES[-1],
    rank: int = 0,
    size: int = 1,
) -> dict[tuple[int, int, str], Tensor]:
    """(layer, expert, "gate" | "up" | "down") -> the update "out in" in float64 that SGLang adds.

    As a server started with `--lora-paths` of this one adapter's folder; or one that is handed a stream after the other
    by `load_lora_adapter_from_tensors` and `unload_lora_adapter`, the first telling what is wrapped
    (`--max-lora-rank`, `--lora-target-modules`). Empty where the experts are not wrapped at all. Of `size` ranks that
    are tensor parallel, the one whose buffers are read is `rank`.

    Raises:
        RuntimeError: With SGLang's message, if loading fails; whatever else SGLang raises when it fills its buffers.
    """
    from transformers import AutoConfig

    architecture = base_config["architectures"][0]
    rest = {key: value for key, value in base_config.items() if key not in ("model_type", "transformers_version")}
    hf_config = AutoConfig.for_model(base_config["model_type"], **rest)
    sources = _sources(release)
    with _package(sources, rank, size):
        from sglang.srt.lora.lora_manager import LoRAManager

        model = _model(_model_file(sources, architecture), architecture, hf_config, rank, size)
        path = str(adapter.resolve()) if isinstance(adapter, Path) else "__tensor__"
        reference = SimpleNamespace(lora_id="a", lora_name="a", lora_path=path, pinned=False)
        steps = iter(()) if isinstance(adapter, Path) else iter(adapter)
        first = next(steps, None)
        said = first.config if first else {}
        manager = LoRAManager(
            base_model=model,
            base_hf_config=hf_config,
            max_loras_per_batch=2,
            load_config=Placeholder(),
            dtype=torch.float64,
            server_args=_SETTINGS,
            lora_paths=[reference] if isinstance(adapter, Path) else [],
            **({"max_lora_rank": said["r"], "target_modules": set(said["target_modules"])} if said else {}),
        )
        for stream in chain([first] if first else [], steps):
            if "a" in manager.loras:
                _take(manager.unload_lora_adapter(reference))
            held = {name: tensor.clone() for name, tensor in stream}
            _take(manager.load_lora_adapter_from_tensors(reference, held, stream.config))
        manager.fetch_new_loras({"a"})
        slot = manager.memory_pool.get_buffer_id("a")
        return _updates(model, slot, manager.max_lora_rank)


def _take(result: Any) -> None:
    if not result.success:
        raise RuntimeError(result.error_message)


class _Output:
    """What stands for the kernel's output tensor: a shape, the slot to read, and the update found."""

    shape = (1, 1, 1)

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.update: Tensor = torch.empty(0)


def _updates(model: nn.Module, slot: int, rank: int) -> dict[tuple[int, int, str], Tensor]:
    """The slices that the real `_add_lora_*_delta` hand to the kernel, multiplied, in rows as the base weight lies.

    gpt_oss keeps its base w13 interleaved, all others in halves (`FusedMoEWithLoRA._uses_interleaved_gate_up`).
    """
    from sglang.srt.lora.layers import FusedMoEWithLoRA
    from sglang.srt.lora.lora_moe_runners import _add_lora_down_delta, _add_lora_gate_up_delta

    found: dict[tuple[int, int, str], Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, FusedMoEWithLoRA) or not module.set_lora:
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        info = SimpleNamespace(
            gate_up_lora_a_weights=module.gate_up_lora_a_weights,
            gate_up_lora_b_weights=module.gate_up_lora_b_weights,
            down_lora_a_weights=module.down_lora_a_weights,
            down_lora_b_weights=module.down_lora_b_weights,
            max_lora_rank=rank,
            num_experts=module.base_layer.num_experts,
            experts_shared_outer_loras=module.experts_shared_outer_loras,
            lora_use_virtual_experts=False,
            has_active_lora=True,
            adapter_enabled=None,
        )
        updates = []
        for add in (_add_lora_gate_up_delta, _add_lora_down_delta):
            output = _Output(slot)
            add(output, output, None, None, info, None, None, None, None, None)
            updates.append(output.update)
        gate_up, down = updates
        if not module.moe_runner_config.is_gated:
            roles = {"up": gate_up}
        elif module._uses_interleaved_gate_up:
            roles = {"gate": gate_up[:, ::2], "up": gate_up[:, 1::2]}
        else:
            half = gate_up.shape[1] // 2
            roles = {"gate": gate_up[:, :half], "up": gate_up[:, half:]}
        for role, update in {**roles, "down": down}.items():
            for expert in range(update.shape[0]):
                found[layer, expert, role] = update[expert].clone()
    return found
