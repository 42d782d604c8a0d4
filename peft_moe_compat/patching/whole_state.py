"""accelerate's own checkpoints: whole models by the names of their tensors, without the config of any adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from ..adapters.safetensors_io import read_header
from ..errors import AdapterError
from ..model.wrappers import is_param_wrapper

__all__ = ["load_accelerator_state"]


def load_accelerator_state(stock: Any) -> Any:
    """For the function of that name, by which `Accelerator.load_state` loads models, then optimizers by position.

    Nothing in such a folder says who laid it out. Where shapes do, it is refused before anything is loaded; torch would
    fail once it has loaded the rest of the model.
    """

    @wraps(stock)
    def replacement(input_dir: Any, models: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for index, model in enumerate(models):
            _refuse_another_layout(model, Path(input_dir, f"model{f'_{index}' if index else ''}.safetensors"))
        return stock(input_dir, models, *args, **kwargs)

    return replacement


def _refuse_another_layout(model: Any, file: Path) -> None:
    """Raises where a file has the factors of experts in other shapes than the model."""
    import peft

    wrappers = {name: module for name, module in model.named_modules() if is_param_wrapper(module)}
    if not wrappers or not file.is_file():
        return
    shapes = {info.name: info.shape for info in read_header(file)[1]}
    for path, wrapper in wrappers.items():
        for factor, linears in (("lora_A", wrapper.lora_A), ("lora_B", wrapper.lora_B)):
            for adapter, linear in linears.items():
                name, held = f"{path}.{factor}.{adapter}.weight", tuple(linear.weight.shape)
                if shapes.get(name, held) != held:
                    raise AdapterError(
                        f"{file} has {name!r} as {shapes[name]}; PEFT {peft.__version__} holds {held} there: another "
                        "adapter, or a PEFT or transformers of another layout. What accelerate saves of model and "
                        "optimizer is not converted. Resume with the releases that wrote it; or save the adapter there "
                        "by model.save_pretrained, which PeftModel.from_pretrained converts, and start a new run."
                    )
