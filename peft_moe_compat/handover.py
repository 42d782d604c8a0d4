"""A live model's adapter in the form a reader takes, from memory: what `convert_adapter` writes of its saved file.

Names, config and layout are those of the file that `save_pretrained` would write; the tensors are the model's own,
gathered where they are spread over processes. One plan (`adapters.plan`) serves both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.base_model import BaseModel, load_base_model
from .adapters.convert import Conversion, emitted, layout_of, planned, write_adapter
from .adapters.files import atomic_folder, usable_path
from .adapters.plan import Plan
from .adapters.proof import by_rules
from .adapters.reader_target import parse_target
from .adapters.safetensors_io import TensorInfo
from .adapters.source import AdapterSource, source_of
from .adapters.stated import Stated
from .adapters.steps import Step
from .adapters.tensors import HeldTensors, check_finite
from .errors import AdapterError
from .model.experts import bare
from .model.sharding import whole
from .patching.saving import config_of, metadata_of
from .proving import prove

__all__ = ["AdapterStream", "adapter_tensors", "save_adapter"]

# Those of 8 bits need a scale, which no file of factors has: e4m3 clips without a word, e8m0 has no sign.
_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Places(Mapping[str, Tensor]):
    """Tensors of a model by name, as they are when they are asked for: parameters may be replaced meanwhile."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._model, self._tensors = model, tensors
        places = {
            id(tensor): (path, local)
            for path, module in model.named_modules(remove_duplicate=False)
            for held in (module._parameters, module._buffers)
            for local, tensor in held.items()
        }
        self._places = {name: places.get(id(tensor)) for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        if place is None:  # what a module's own state dict makes
            return self._tensors[name]
        try:
            module = self._model.get_submodule(place[0])
        except AttributeError:
            raise KeyError(name) from None
        tensor = module._parameters.get(place[1], module._buffers.get(place[1]))
        if tensor is None:
            raise KeyError(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass
class _LiveTensors(HeldTensors):
    """The adapter's tensors in a model: parameters, whole ones or this process's pieces.

    Attributes:
        config: What its adapter_config.json would say now.
        planned: What it said when the plan was made.
    """

    config: Callable[[], Any] = dict
    planned: Any = None

    def check(self) -> None:
        """Raises `AdapterError` where the adapter is not that of the plan any more."""
        now = {name: self.held.get(name) for name in self.infos}
        known = {name: (info.shape, info.dtype) for name, info in self.infos.items()}
        changed = [name for name, t in now.items() if t is None or (_shape(t), t.dtype) != known[name]]
        if changed or self.config() != self.planned:
            what = f"{len(changed)} of its tensors, {changed[0]} among them," if changed else "its config"
            raise AdapterError(
                f"The adapter is another than when this stream was made: {what} changed, by a hot swap or a cast, say. "
                "Make another stream: adapter_tensors(model, ...)."
            )

    @contextmanager
    def reading(self, names: Any) -> Iterator[dict[str, Tensor]]:
        wanted = self._read(list(dict.fromkeys(names)))
        with _gathered(wanted.values()):
            tensors = {name: _whole(tensor) for name, tensor in wanted.items()}
            try:
                yield tensors
            finally:
                tensors.clear()


@contextmanager
def _gathered(tensors: Any) -> Iterator[None]:
    """While DeepSpeed ZeRO-3 has the pieces of these tensors put together, where it has cut any."""
    cut = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not cut:
        yield
        return
    deepspeed: Any = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(cut):
        yield


def _whole(tensor: Tensor) -> Tensor:
    found = whole(tensor)
    if found.is_meta:
        raise AdapterError(
            "A tensor of the adapter is on the meta device: offloaded by accelerate, or never loaded. Keep the adapter "
            "in memory to hand it over."
        )
    return found


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@dataclass(frozen=True, eq=False)
class AdapterStream:
    """(name, tensor) pairs of an adapter as a reader takes them: an iterable that may be gone through again and again.

    Every round reads the model's weights of that moment, so one stream serves a whole run: train between rounds, not
    in the middle of one. An adapter of other shapes, dtypes or config than it was made for is an `AdapterError`.

    A tensor is valid until the next one is asked for, and may be a view of the model's own weights: copy what you keep.
    Where weights are spread over processes (FSDP2, expert parallelism, ZeRO-3) going through it is a collective
    operation: every rank does, and gets all.

    Attributes:
        target: The reader, as `to` named it.
        layout: (name, shape, dtype) of every tensor, in order.
    """

    target: str
    layout: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    _source: AdapterSource
    _plan: Plan
    _dtype: torch.dtype | None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self._source.tensors, _LiveTensors):
            self._source.tensors.check()
        for name, tensor in emitted(self._source, self._plan):
            cast = tensor.to(_dtype_of(tensor.dtype, self._dtype))
            if cast.dtype == torch.float16 and tensor.dtype != torch.float16:  # of a smaller range
                check_finite(name, cast)
            yield name, cast

    def __len__(self) -> int:
        return len(self.layout)

    def __repr__(self) -> str:
        return f"AdapterStream({len(self)} tensors for {self.target}, {self.exactness})"

    @property
    def config(self) -> dict[str, Any]:
        """What adapter_config.json says beside these tensors."""
        return self._plan.config

    @property
    def metadata(self) -> dict[str, str]:
        """What this library writes into the file's metadata; empty where there is nothing to say."""
        return self._plan.metadata

    @property
    def exactness(self) -> str:
        """`"bits"`, `"round-off"` or `"lossy"`; see `Conversion`. A `dtype` of fewer bits rounds."""
        made = layout_of(self._source, self._plan)
        rounds = any(torch.promote_types(a[2], b[2]) != b[2] for a, b in zip(made, self.layout, strict=True))
        return "round-off" if rounds and self._plan.exactness == "bits" else self._plan.exactness

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is done beyond laying out the same numbers anew; `str()` of one is a sentence."""
        return self._plan.steps

    @property
    def nbytes(self) -> int:
        """Of all tensors together."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in self.layout)


def _dtype_of(found: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and found.is_floating_point else found


def adapter_tensors(
    model: nn.Module,
    to: str = "peft",
    *,
    adapter_name: str | None = None,
    dtype: torch.dtype | None = None,
    allow_lossy: bool = False,
) -> AdapterStream:
    """The adapter of a live model in the form a reader takes: what `convert_adapter(..., to=to)` writes of its file.

    Nothing is copied to the processor or to a disk: a projection at a time is laid out anew where it lies.

    Args:
        model: A `PeftModel`, or a transformers model with an adapter.
        to: The reader, as `convert_adapter` takes it: `vllm`, `sglang`, `per-expert`, `peft==VERSION`, ...
        adapter_name: Which of its adapters; the active one by default.
        dtype: Of the tensors handed over; that of the model's by default.
        allow_lossy: See `convert_adapter`.

    Raises:
        AdapterError: There is no such adapter or several are active, `dtype` is an integer's or of 8 bits, or what
            `convert_adapter` raises for its file.
    """
    if dtype not in _DTYPES:
        taken = ", ".join(str(taken).removeprefix("torch.") for taken in _DTYPES if taken is not None)
        raise AdapterError(f"dtype={dtype} cannot hold an adapter's weights; one of {taken} was expected.")
    source, stated = _live(model, adapter_name)
    target = parse_target(to)
    _, plan = planned(source, stated, target, False, allow_lossy)
    layout = tuple((name, shape, _dtype_of(found, dtype)) for name, shape, found in layout_of(source, plan))
    return AdapterStream(str(target), layout, source, plan, dtype)


def save_adapter(
    model: nn.Module,
    out: str | Path,
    to: str = "peft",
    *,
    adapter_name: str | None = None,
    allow_lossy: bool = False,
) -> Conversion | None:
    """Writes the adapter of a live model in the form a reader takes; `out` appears complete or not at all.

    In a group of processes every rank calls it, whether weights are spread over them or not, and the first writes.
    Where the first fails in the middle, as on a full disk, the others wait until their collective operation times out.

    Args:
        model, to, adapter_name, allow_lossy: See `adapter_tensors`.
        out: The folder to make. It must not exist.

    Returns:
        What was done, as `convert_adapter` tells it; None on all ranks but the first.

    Raises:
        AdapterError: See `adapter_tensors`; or `out` cannot be made.
    """
    source, stated = _live(model, adapter_name)
    target = parse_target(to)
    decision, plan = planned(source, stated, target, False, allow_lossy)
    with ExitStack() as stack:
        folder = _made_by_the_first(stack, out)
        if folder is None:
            for _ in emitted(source, plan):
                pass
            return None
        write_adapter(folder, source, plan, ahead=False)  # collective operations stay in the caller's thread
        proof = prove(folder, target, source.base) or by_rules(folder, target, source.base)
    return Conversion(Path(out), str(target), plan.exactness, plan.steps, decision, proof)


def _made_by_the_first(stack: ExitStack, out: str | Path) -> Path | None:
    """The temporary folder for `out` on the first rank, None on others; what speaks against it is raised on all."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several:
        return stack.enter_context(atomic_folder(usable_path(out), source=None))
    folder, refused = None, [""]
    if torch.distributed.get_rank() == 0:
        try:
            folder = stack.enter_context(atomic_folder(usable_path(out), source=None))
        except AdapterError as error:
            refused = [str(error)]
    torch.distributed.broadcast_object_list(refused, src=0)
    if refused[0]:
        raise AdapterError(refused[0])
    return folder


def _live(model: Any, adapter_name: str | None) -> tuple[AdapterSource, Stated]:
    """The adapter as `open_adapter` would find it in its file."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    name = _adapter(model, adapter_name)
    held = _tensors_of(model, name)
    shapes = {key: _shape(tensor) for key, tensor in held.items()}
    raw = config_of(model, name)
    metadata = metadata_of(model, shapes, raw)
    where = Path(f"adapter {name!r} of the model")
    infos = {key: TensorInfo(key, shapes[key], tensor.dtype, where, 0) for key, tensor in held.items()}
    stated = Stated(_base_of(model))
    live = _LiveTensors(
        infos, metadata, held=_Places(model, held), config=lambda: config_of(model, name), planned=deepcopy(raw)
    )
    return source_of(where, raw, live, stated), stated


def _adapter(model: Any, wanted: str | None) -> str:
    configs = getattr(model, "peft_config", None) or {}
    has = f"it has {', '.join(map(repr, configs)) or 'none'}"
    if wanted is not None:
        if wanted not in configs:
            raise AdapterError(f"The model has no adapter {wanted!r}; {has}.")
        return wanted
    if not configs:
        raise AdapterError("The model has no adapter. Pass the PeftModel itself: model.module of DDP's wrapper, say.")
    found: Any = getattr(model, "active_adapters", [])
    active: list[str] = list(found() if callable(found) else found)
    if len(active) != 1:
        raise AdapterError(f"{len(active)} adapters of the model are active, not one; {has}. Pass adapter_name.")
    return active[0]


def _tensors_of(model: Any, name: str) -> dict[str, Tensor]:
    """What PEFT would save, by the names it would have there, as the model holds it."""
    from peft import get_peft_model_state_dict

    ours = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    # PEFT picks and renames by name, and would gather here what is spread over ranks: it is shown numbers instead.
    keys = list(ours)
    shown = {key: torch.tensor(number) for number, key in enumerate(keys)}
    saved = get_peft_model_state_dict(model, state_dict=shown, adapter_name=name)
    return {new: ours[keys[int(number)]] for new, number in saved.items()}


def _base_of(model: Any) -> BaseModel | None:
    base: Any = bare(model)
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    raw = config.to_dict()
    return load_base_model({**raw, "architectures": raw.get("architectures") or [type(base).__name__]})
