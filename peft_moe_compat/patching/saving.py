"""Adapters stamped while they are saved, and refused where what is to be written is not the model's LoRA.

Their configs say what stock PEFT finds by it (`targets`). Nothing is kept on any module; what is being saved stands in
a context variable for the length of the call.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.adapter_config import CONFIG_NAME
from ..adapters.files import read_json
from ..adapters.names import PREFIX, unwrapped
from ..adapters.stamp import ModuleStamp, Stamp, config_entry, numbers_of
from ..errors import AdapterError
from ..model.experts import bare, features, is_transposed
from ..model.wrappers import is_param_wrapper
from .context import holding
from .displaced import notice
from .matching import chains, has_experts, live_path, orientation_of
from .sharding import refuse_partitioned
from .targets import named_for_any_reader

__all__ = ["config_of", "metadata_of", "safe_save_file", "save_pretrained", "stamp_of", "write_config"]


@dataclass(frozen=True)
class _Save:
    """One call of `save_pretrained`.

    Attributes:
        model: What is saved.
        folder: Where.
    """

    model: Any
    folder: Path

    def adapter(self, file: Path) -> str:
        """The adapter that a file is for: PEFT gives each a folder of its name, but for "default"."""
        if not hasattr(self.model, "get_base_model"):
            return str(self.model.active_adapters()[0])
        return "default" if file.parent.absolute() == self.folder.absolute() else file.parent.name


_saving: ContextVar[_Save | None] = ContextVar("peft_moe_compat_saving", default=None)


def save_pretrained(stock: Any) -> Any:
    @wraps(stock)
    def saving(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        sides = kwargs.get("path_initial_model_for_weight_conversion") is not None
        if sides and any(w.num_experts > 1 for w in self.modules() if is_param_wrapper(w)):
            raise AdapterError(
                "path_initial_model_for_weight_conversion makes one LoRA of two by laying their factors side by side, "
                "which PEFT does wrongly for those of experts: the saved updates would be others. Save the adapter as "
                "it is, or with LoRA on linears alone."
            )
        with holding(_saving, _Save(self, Path(save_directory))), named_for_any_reader(self):
            return stock(self, save_directory, *args, **kwargs)

    return saving


def safe_save_file(stock: Any) -> Any:
    """Whichever process writes an adapter file writes the stamp into it, at once."""

    @wraps(stock)
    def saving(tensors: Any, filename: Any, metadata: Any = None) -> Any:
        notice()
        save = _saving.get()
        if save is not None and Path(filename).name.startswith("adapter_model"):
            model = save.model
            if not tensors and any(map(is_param_wrapper, model.modules())):
                raise AdapterError(
                    f"There is nothing to save in {filename}: PEFT found none of the model's LoRA by the names it "
                    "expects (torch's checkpoint_wrapper gives modules others), or was given an empty state_dict, as "
                    "all ranks but the first have of FSDP's full one."
                )
            if lost := _lost(model, tensors, adapter := save.adapter(Path(filename))):
                raise AdapterError(
                    f"PEFT found no LoRA of {len(lost)} expert parameters to save in {filename}, by the names it "
                    f"expects, {lost[0]} first: torch's checkpoint_wrapper (accelerate's FSDP activation_checkpointing "
                    "too) gives modules other names. Use model.gradient_checkpointing_enable() instead, which does not."
                )
            refuse_partitioned(tensors)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            # Whoever is killed before the config is written leaves weights that say so.
            stamped = metadata_of(model, shapes, model.peft_config[adapter].to_dict())
            metadata = {**(metadata or {}), **stamped} if stamped else metadata
        return stock(tensors, filename, metadata=metadata)

    return saving


def _lost(model: Any, tensors: Mapping[str, Tensor], adapter: str) -> list[str]:
    """The wrapped expert parameters whose LoRA should be in a file of the model's, and is not."""
    found = {unwrapped(tensor.removeprefix(PREFIX)) for tensor in tensors}
    return [
        f"{live_path(path)}.{wrapper.parameter_name}"
        for path, wrapper in bare(model).named_modules()
        if is_param_wrapper(wrapper)
        and adapter in wrapper.lora_A
        and "_checkpoint_wrapped_module" in path  # else whoever saves has chosen
        and f"{unwrapped(path)}.lora_A.weight" not in found
    ]


def config_of(model: Any, adapter_name: str) -> dict[str, Any]:
    """What `write_config` writes."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(model, adapter_name, folder)
        return read_json(Path(folder) / CONFIG_NAME)


def write_config(model: Any, adapter_name: str, folder: str) -> None:
    """Writes the adapter_config.json that `save_pretrained` writes for an adapter of a live model."""
    base = bare(model)
    with named_for_any_reader(model):
        config = copy.copy(model.peft_config[adapter_name])
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = vars(base).get("name_or_path") or None
        auto = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config.save_pretrained(folder, auto_mapping_dict=auto if config.task_type is None else None)


def metadata_of(model: Any, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, str]:
    """The entry for the metadata of a file of these tensors beside this config.

    Without a stamp it is of what the config says alone; empty for a model without experts, or no LoRA.
    """
    stamp = stamp_of(model, shapes)
    if stamp is not None:
        return replace(stamp, config=numbers_of(config)).to_metadata()
    return config_entry(config) if config.get("peft_type") == "LORA" and has_experts(model) else {}


def stamp_of(model: Any, of_tensors: Mapping[str, tuple[int, ...]]) -> Stamp | None:
    """The stamp for a file of a live model's tensors, by name and shape; None where no fused expert LoRA is in it.

    It speaks of all of the file's expert stacks or not at all: there is none where the orientation of one is unknown or
    differs between its parameters, or the tensors are not those of the wrappers.
    """
    import peft
    import transformers

    shapes = {unwrapped(name.removeprefix(PREFIX)): shape for name, shape in of_tensors.items()}
    modules = {}
    for path, chain in chains(model).items():
        names = [f"{path}{'.base_layer' * depth}.lora_" for depth in range(len(chain))]
        slots = [
            (w, shapes[f"{n}A.weight"], shapes[f"{n}B.weight"])
            for w, n in zip(chain, names, strict=True)
            if f"{n}A.weight" in shapes and f"{n}B.weight" in shapes
        ]
        num_experts = max((wrapper.num_experts for wrapper, _, _ in slots), default=1)  # a bias counts as one
        if num_experts == 1:
            continue
        orientations = {orientation_of(wrapper) for wrapper, _, _ in slots}
        orientation = orientations.pop()
        sizes = tuple(features(chain[0].get_base_layer(), wrapper.parameter_name) for wrapper, _, _ in reversed(slots))
        written = tuple((A[1], B[0]) if orientation == "linear" else (B[0], A[1]) for _, A, B in reversed(slots))
        if orientations or sizes != written or is_transposed(chain[0].get_base_layer()) is None:
            return None
        nesting = tuple(wrapper.parameter_name for wrapper, _, _ in reversed(slots))
        modules[path] = ModuleStamp(num_experts, nesting, orientation, sizes)
    return Stamp(peft.__version__, transformers.__version__, "rank_major", modules) if modules else None
