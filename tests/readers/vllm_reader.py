"""What vLLM applies of a LoRA folder on MoE experts, by vLLM's own code on the CPU.

Real, executed from the fetched sources: `WorkerLoRAManager.add_adapter` and `_load_adapter`, `PEFTHelper`,
`LoRAModel.from_local_checkpoint`, `LoRAModelManager` whole (its `__init__`, `_create_lora_modules`, `add_adapter`,
`activate_adapter`), `pack_moe`, `FusedMoEWithLoRA` and `FusedMoE3DWithLoRA` whole, `process_packed_modules_mapping`,
`RoutedExperts.build_expert_params_mapping`, `WeightsMapper`, and of each model class its `hf_to_vllm_mapper`,
`packed_modules_mapping`, `is_3d_moe_weight`, `is_non_gated_moe`, `lora_skip_prefixes` and the names it gives its
experts' checkpoint weights.

Test doubles: the model is a tree of empty modules with the names of vLLM's own tree (`_model`, from the attribute names
in the model's file), `MoERunner` holds sizes only (`_Runner`), `LoRAConfig` is a namespace (float64 instead of the
model's dtype, so that nothing is rounded), and the kernels are B @ A of the buffers `set_lora` has filled (`_updates`).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peft_moe_compat import AdapterStream
from peft_moe_compat.integrations.vllm import load_adapter

from .fetch import releases
from .stubs import ModelFile, Package, StubClass

__all__ = ["RELEASES", "natively_stacked", "read"]

RELEASES = releases("vllm")
_MEMBERS = (
    "hf_to_vllm_mapper",
    "packed_modules_mapping",
    "is_3d_moe_weight",
    "is_non_gated_moe",
    "embedding_modules",
    "lora_skip_prefixes",
)
_REAL = (
    "vllm.lora.peft_helper",
    "vllm.lora.lora_weights",
    "vllm.lora.lora_model",
    "vllm.lora.utils",
    "vllm.lora.model_manager",
    "vllm.lora.worker_manager",
    "vllm.lora.layers.base",
    "vllm.lora.layers.fused_moe",
    "vllm.model_executor.utils",
    "vllm.model_executor.models.utils",
    "vllm.model_executor.layers.fused_moe.routed_experts",
    "vllm.utils.cache",
)


# "tensor" or "expert", the rank, and how many there are.
Share = tuple[str, int, int]


class _Runner(nn.Module):
    """Double of `MoERunner`: sizes, and what `FusedMoEWithLoRA.__init__` asks for."""

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, gated: bool, mapping: list[Any], share: Share
    ) -> None:
        super().__init__()
        how, rank, size = share
        tensor, expert = (size, 1) if how == "tensor" else (1, size)
        parallel = SimpleNamespace(
            tp_size=tensor,
            tp_rank=rank if how == "tensor" else 0,
            ep_rank=rank if how == "expert" else 0,
            use_ep=how == "expert",
            all2all_backend="allgather_reducescatter",
            is_sequence_parallel=False,
        )
        self.moe_config = SimpleNamespace(
            moe_parallel_config=parallel,
            hidden_dim=hidden,
            num_local_experts=num_experts // expert,
            num_experts=num_experts,
            intermediate_size_per_partition=intermediate // tensor,
            intermediate_size_per_partition_unpadded=intermediate // tensor,
            experts_per_token=1,
            is_act_and_mul=gated,
        )
        self._shared_experts = None
        kernel = SimpleNamespace(impl=_Kernel(), fused_experts=_Experts(), prepare_finalize=None)
        kernel.supports_lora = lambda: True
        self._quant_method = SimpleNamespace(is_monolithic=False, supports_internal_mk=True, moe_kernel=kernel)
        self.routed_experts = SimpleNamespace(
            quant_method=self._quant_method, _ensure_moe_quant_config_init=lambda: None, lora_base_layer_prefix=""
        )
        self._mapping = mapping

    def get_expert_mapping(self) -> list[Any]:
        return self._mapping

    def _replace_quant_method(self, method: object) -> None:
        pass


class _Linear(nn.Module):
    """Double of `LinearBase`: a name that LoRA is allowed on."""


class _Kernel:
    """Double of `FusedMoEKernelModularImpl`."""


class _Experts:
    """Double of `LoRAExpertsMixin`."""

    def set_lora_context(self, context: object) -> None:
        pass


class _NoSync:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def _sources(release: str) -> Path:
    return Path(os.environ["PEFT_MOE_COMPAT_READERS"]) / f"vllm-{release}"


@functools.cache
def _package(sources: Path) -> Package:
    fused_moe = "vllm.model_executor.layers.fused_moe"
    return Package(
        sources,
        "vllm",
        _REAL,
        reexports={"vllm.lora.layers": ("vllm.lora.layers.base", "vllm.lora.layers.fused_moe")},
        doubles={
            (fused_moe, "MoERunner"): _Runner,
            (f"{fused_moe}.experts.lora_experts_mixin", "LoRAExpertsMixin"): _Experts,
            (f"{fused_moe}.modular_kernel", "FusedMoEKernelModularImpl"): _Kernel,
            ("vllm.model_executor.layers.linear", "LinearBase"): _Linear,
            ("vllm.model_executor.custom_op", "maybe_get_oot_by_class"): lambda cls: cls,
            ("vllm.model_executor.custom_op", "PluggableLayer"): StubClass,
            ("vllm.lora.request", "LoRARequest"): _request,
            ("vllm.lora.layers.utils", "_get_lora_device"): lambda layer: torch.device("cpu"),
            ("vllm.model_executor.models", "supports_multimodal"): lambda model: hasattr(model, "get_mm_mapping"),
            ("vllm.utils.gpu_sync_debug", "gpu_sync_allowed"): _NoSync,
            ("vllm.exceptions", "LoRAAdapterNotFoundError"): FileNotFoundError,
            ("vllm.distributed.eplb.eplb_state", "EplbState"): SimpleNamespace(
                # EplbState.build_initial_global_physical_to_logical_map (0.33.0), without redundant experts
                build_initial_global_physical_to_logical_map=lambda experts, redundant: list(range(experts))
            ),
            ("vllm.platforms", "current_platform"): SimpleNamespace(is_cuda_alike=lambda: False),
        },
    )


def _registered(models: Path) -> dict[str, tuple[str, str]]:
    """Architecture -> (file, class) of the registry."""
    registry = ast.parse((models / "registry.py").read_text(encoding="utf-8"))
    return {
        key.value: ast.literal_eval(value)
        for node in ast.walk(registry)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2
        if all(isinstance(item, ast.Constant) for item in value.elts)
    }


def natively_stacked(release: str) -> set[str]:
    """The architectures whose class sets `is_3d_moe_weight`."""
    models = _sources(release) / "vllm" / "model_executor" / "models"
    found = set()
    for architecture, (stem, name) in _registered(models).items():
        if (models / f"{stem}.py").is_file():
            with contextlib.suppress(KeyError):  # a class that its file imports from elsewhere
                cls = ModelFile(models / f"{stem}.py", ("is_3d_moe_weight",), {}).resolve(name)
                found |= {architecture} if getattr(cls, "is_3d_moe_weight", False) is True else set()
    return found


class _ModelSource:
    """What the file of one model class says about its experts.

    Attributes:
        cls: The class, cut down to `_MEMBERS`.
        experts: Name of the experts module below `layers.{i}`.
        ckpt_names: Of gate, down and up in the checkpoint.
        multimodal: Whether the decoder is mounted under `language_model`.
    """

    def __init__(self, sources: Path, architecture: str, mapper: type) -> None:
        models = sources / "vllm" / "model_executor" / "models"
        stem, name = _registered(models).get(architecture, ("", ""))
        if not (models / f"{stem}.py").is_file():
            raise NotImplementedError(f"vLLM has no model file of its own for {architecture}.")
        file = ModelFile(models / f"{stem}.py", _MEMBERS, {"WeightsMapper": mapper})
        self.cls = file.resolve(name)
        self.multimodal = "self.language_model = " in file.text and name.endswith("ForConditionalGeneration")
        self.experts, self.ckpt_names = "mlp.experts", ("gate_proj", "down_proj", "up_proj")
        self._scan(models, file.tree)
        if stem == "mllama4":
            self._scan(models, ast.parse((models / "llama4.py").read_text(encoding="utf-8")))

    def _scan(self, models: Path, tree: ast.Module) -> None:
        """The attribute that holds the MoE block, and `ckpt_names` of `FusedMoEFactory`."""
        blocks = set()
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                for call in (c for c in ast.walk(node) if isinstance(c, ast.Call)):
                    if isinstance(call.func, ast.Name) and call.func.id == "FusedMoEFactory":
                        blocks.add(node.name)
                        names = next((k.value for k in call.keywords if k.arg == "ckpt_names"), None)
                        if names is not None:
                            self.ckpt_names = ast.literal_eval(names)
                # A model's own get_expert_mapping comes before the experts' (`get_moe_expert_mapping`).
                own = (f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "get_expert_mapping")
                for function in own:
                    given = {k.arg: k.value for c in ast.walk(function) if isinstance(c, ast.Call) for k in c.keywords}
                    wanted = [given.get(f"ckpt_{role}_proj_name") for role in ("gate", "down", "up")]
                    if all(value is not None for value in wanted):
                        self.ckpt_names = tuple(ast.literal_eval(value) for value in wanted)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                block, target = node.value.func, node.targets[0]
                if isinstance(block, ast.Name) and block.id in blocks and isinstance(target, ast.Attribute):
                    self.experts = f"{target.attr}.experts"


class _Tree(nn.Module):
    def put(self, path: str, module: nn.Module) -> None:
        *parents, leaf = path.split(".")
        owner: nn.Module = self
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, module)


def _model(
    source: _ModelSource, config: Mapping[str, Any], architecture: str, build_mapping: Any, share: Share
) -> nn.Module:
    """Double of the model: vLLM's module names, the real class attributes."""
    text = {**config, **(config.get("text_config") or {})}
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    num_experts = next(int(text[name]) for name in counts if text.get(name))
    intermediate = int(text.get("moe_intermediate_size") or text["intermediate_size"])
    gated = not getattr(source.cls, "is_non_gated_moe", False)
    mapping = build_mapping(*source.ckpt_names, num_experts, routed_experts_prefix="")
    attributes = {
        "is_3d_moe_weight": False,  # defaults: SupportsLoRA of models/interfaces.py (0.33.0)
        "is_non_gated_moe": False,
        "embedding_modules": {},
        "packed_modules_mapping": {},
        "lora_skip_prefixes": [],
    }
    defaults = {name: value for name, value in attributes.items() if not hasattr(source.cls, name)}
    model = type(architecture, (source.cls, _Tree), defaults)()
    nn.Module.__init__(model)
    model.config = SimpleNamespace(architectures=[architecture])
    if source.multimodal:
        model.get_mm_mapping = lambda: SimpleNamespace(language_model=["language_model"], tower_model=[], connector=[])
        model.supports_tower_connector_lora = False
    prefix = "language_model.model" if source.multimodal else "model"
    kinds = text.get("layers_block_type") or ["moe"] * int(text["num_hidden_layers"])
    for layer in (i for i, kind in enumerate(kinds) if kind == "moe"):
        runner = _Runner(num_experts, int(text["hidden_size"]), intermediate, gated, mapping, share)
        model.put(f"{prefix}.layers.{layer}.{source.experts}", runner)
        for linear in ("qkv_proj", "o_proj"):
            model.put(f"{prefix}.layers.{layer}.self_attn.{linear}", _Linear())
    return model


def read(
    adapter: Path | Iterable[AdapterStream],
    base_config: Mapping[str, Any],
    *,
    release: str = RELEASES[-1],
    max_lora_rank: int = 64,
    mixed_format: bool = False,
    is_3d: bool = False,
    shared: bool = False,
    share: Share = ("tensor", 0, 1),
) -> dict[tuple[int, int, str], Tensor]:
    """(layer, expert, "gate" | "up" | "down") -> the update "out in" in float64 that vLLM adds, where it adds any.

    Args:
        adapter: Its folder; or streams, which `integrations.vllm.load_adapter` hands to the manager one after the
            other, each in the place of the last.
        base_config: The base model's config.json; its `architectures[0]` picks vLLM's model class.
        release: Of vLLM, one of `RELEASES`.
        max_lora_rank: `--max-lora-rank`.
        mixed_format: `--enable-mixed-moe-lora-format`.
        is_3d: `is_3d_lora_weight` of the request; read under `mixed_format` only.
        shared: `--enable-moe-shared-loras`.
        share: Whose buffers are read: "tensor" or "expert" parallel, the rank, and of how many.

    Raises:
        Whatever vLLM raises when it refuses the adapter.
    """
    architecture = base_config["architectures"][0]
    lora_config = SimpleNamespace(
        max_lora_rank=max_lora_rank,
        max_loras=1,
        max_cpu_loras=1,
        fully_sharded_loras=False,
        lora_dtype=torch.float64,
        target_modules=None,
        enable_tower_connector_lora=False,
        enable_mixed_moe_lora_format=mixed_format,
        enable_moe_shared_loras=shared,
    )
    sources = _sources(release)
    with _package(sources):
        from vllm.lora.model_manager import LRUCacheLoRAModelManager
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.models.utils import WeightsMapper

        source = _ModelSource(sources, architecture, WeightsMapper)
        model = _model(source, base_config, architecture, RoutedExperts.build_expert_params_mapping, share)
        vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(enable_expert_parallel=share[0] == "expert"), model_config=None
        )
        manager = LRUCacheLoRAModelManager(model, 1, 8, 32, lora_config, torch.device("cpu"), vllm_config)
        worker = object.__new__(LRUCacheWorkerLoRAManager)
        worker.__dict__.update(
            _adapter_manager=manager,
            _lora_model_cls=_lora_model_class(),
            lora_config=lora_config,
            vocab_size=32,
            max_position_embeddings=None,
        )
        if isinstance(adapter, Path):
            worker.add_adapter(_request("a", 1, str(adapter.resolve()), is_3d_lora_weight=is_3d))
        for stream in () if isinstance(adapter, Path) else adapter:
            load_adapter(worker, stream)
        return _updates(model, architecture)


def _request(lora_name: str, lora_int_id: int, lora_path: str, **options: bool) -> SimpleNamespace:
    """Double of `LoRARequest`, which is a struct of msgspec's."""
    defaults = {"load_inplace": False, "is_3d_lora_weight": False, "tensorizer_config_dict": None, **options}
    return SimpleNamespace(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path, **defaults)


def _lora_model_class() -> type:
    from vllm.lora.lora_model import LoRAModel

    return LoRAModel


def _updates(model: nn.Module, architecture: str) -> dict[tuple[int, int, str], Tensor]:
    """Double of the kernels (`punica_wrapper.add_lora_fused_moe`): B @ A per expert from the buffers of slot 0.

    The scaling is in lora_B already (`optimize`). With one w13 slice the rows are split as the base weight lies in that
    class: interleaved in GptOssForCausalLM, halves elsewhere (`FusedMoE3DWithLoRA._slice_w13_b`).
    """
    from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA

    found: dict[tuple[int, int, str], Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, FusedMoEWithLoRA) or not module.adapter_enabled[0]:
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        w13 = [b[0] @ a[0] for a, b in zip(module.w13_lora_a_stacked, module.w13_lora_b_stacked, strict=True)]
        w2 = module.w2_lora_b_stacked[0][0] @ module.w2_lora_a_stacked[0][0]
        roles = {"gate": w13[0], "up": w13[-1], "down": w2}
        if isinstance(module, FusedMoE3DWithLoRA):
            if architecture == "GptOssForCausalLM":
                roles.update(gate=w13[0][:, ::2], up=w13[0][:, 1::2])
            else:
                half = w13[0].shape[1] // 2
                roles.update(gate=w13[0][:, :half], up=w13[0][:, half:])
        elif len(w13) == 1:
            del roles["gate"]
        for role, update in roles.items():
            for expert in range(update.shape[0]):
                found[layer, expert, role] = update[expert].clone()
    return found
