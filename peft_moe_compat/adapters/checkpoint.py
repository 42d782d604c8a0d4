"""A base model's checkpoint folder: safetensors, alone or in shards, the config, and everything else beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, AdapterFileError
from .adapter_config import AUTOMODEL_NAME, CONFIG_NAME
from .files import download, is_hub_id, read_json, show, usable_path
from .safetensors_io import TensorInfo
from .stored import MXFP4, BlockFP8, Format, Plain
from .tensors import INDEX, AdapterTensors, open_safetensors, open_shards, refuse_outside

__all__ = ["PLAIN", "Checkpoint", "StoredWeight", "open_checkpoint"]

_SINGLE, _SHARDED = "model.safetensors", "model.safetensors.index.json"
_HUB_FILES = ["config.json", "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md"]
# Of an adapter beside the base, which from_pretrained would look for the weights of.
_OF_ADAPTERS = (CONFIG_NAME, AUTOMODEL_NAME, INDEX)
# Ends of files that hold a model's weights in another form: they would be those of the base still.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".safetensors")
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# What stands beside, or in the place of, weights of formats that are not merged into -> what they are called.
_UNKNOWN_FORMATS = {
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes int8",
    ".weight_packed": "compressed-tensors",
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_2": "NVFP4",
    ".weight_scale": "FP8 with a weight_scale",
}


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a checkpoint.

    Attributes:
        name: What its module calls it.
        tensors: What it is stored in.
        format: How.
        shape: Of its numbers: "rows columns" or "E rows columns".
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    format: Format
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, of which headers alone have been read.

    Attributes:
        folder: Where it lies.
        config: config.json.
        tensors: Every tensor.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: AdapterTensors

    def weight(self, name: str) -> StoredWeight | None:
        """The weight of that name, in whichever format; None where there is nothing of the name.

        Raises:
            AdapterError: It is stored in a format that this package does not write.
        """
        infos = self.tensors.infos
        blocks, scales = infos.get(f"{name}_blocks"), infos.get(f"{name}_scales")
        if blocks is not None and scales is not None:
            return self._mxfp4(name, blocks, scales)
        stem = name.removesuffix(".weight")
        unknown = next(
            (what for end, what in _UNKNOWN_FORMATS.items() if {name + end, stem + end} & infos.keys()), None
        )
        info = infos.get(name)
        if info is None and unknown is None:
            return None
        if info is None or unknown is not None:
            raise AdapterError(f"{name!r} of {self.folder} is stored as {unknown}; {_TAKEN}")
        if info.dtype in PLAIN:
            return StoredWeight(name, (info,), Plain(info.dtype), info.shape)
        scale = infos.get(f"{name}_scale_inv")
        if scale is not None and len(info.shape) > 1 and info.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return StoredWeight(name, (info, scale), self._fp8(info, scale), info.shape)
        found = str(info.dtype).removeprefix("torch.")
        raise AdapterError(f"{name!r} of {self.folder} is stored as {found} without {name}_scale_inv; {_TAKEN}")

    def _fp8(self, info: TensorInfo, scale: TensorInfo) -> BlockFP8:
        said = self.config.get("quantization_config") or {}
        block = said.get("weight_block_size") or info.shape[-2:]
        rows_columns = info.shape[-2:]
        expected = (*info.shape[:-2], *(-(-size // edge) for size, edge in zip(rows_columns, block, strict=True)))
        if scale.shape != expected:
            raise AdapterFileError(
                f"{scale.name!r} is {scale.shape}; {expected} was expected for {info.shape} in blocks of "
                f"{tuple(block)}. Is it the config.json of this checkpoint?"
            )
        exponents = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
        if not exponents and scale.dtype not in PLAIN:
            raise AdapterFileError(f"{scale.name!r} is of {scale.dtype}; scales of FP8 in blocks were expected.")
        height, width = (min(size, edge) for size, edge in zip(rows_columns, block, strict=True))
        return BlockFP8((max(height, 1), max(width, 1)), exponents)

    def _mxfp4(self, name: str, blocks: TensorInfo, scales: TensorInfo) -> StoredWeight:
        fits = blocks.shape == (*scales.shape, 16) and len(scales.shape) == 3
        if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise AdapterFileError(
                f"{blocks.name!r} is {blocks.shape} and {scales.name!r} {scales.shape}; bytes 'E out G 16' and "
                "'E out G' were expected of MXFP4."
            )
        return StoredWeight(name, (blocks, scales), MXFP4(), (*scales.shape[:2], 32 * scales.shape[2]))

    @property
    def adapter(self) -> bool:
        """Whether an adapter lies in the same folder."""
        return (self.folder / CONFIG_NAME).is_file()

    def other_files(self) -> Iterator[Path]:
        """Files to copy, relative to the folder: all but weights, an adapter beside them, and what is hidden.

        Raises:
            AdapterFileError: One is a link to outside of the folder.
        """
        for root, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(root, name)
                left = name.startswith(".") or name in _OF_ADAPTERS or path.suffix in _OTHER_WEIGHTS
                if path.is_file() and not left:
                    refuse_outside(path, self.folder)
                    yield path.relative_to(self.folder)


_TAKEN = "LoRA is merged into float32, bfloat16, float16, FP8 in blocks and MXFP4. Merge into another checkpoint of it."


def open_checkpoint(base: str | Path) -> Checkpoint:
    """Opens a checkpoint folder, or the one behind a Hub id.

    Raises:
        AdapterFileError: A file is missing or damaged.
        AdapterError: Its config says that it is quantised in a way that is not merged into.
    """
    folder = usable_path(base)
    if not folder.is_dir():
        if os.path.lexists(folder) or not is_hub_id(str(base)):
            raise AdapterFileError(f"{base} is no folder; that of the base model's checkpoint was needed.")
        folder = download(str(base), _HUB_FILES)
    if not (folder / "config.json").exists() and (folder / CONFIG_NAME).is_file():
        raise AdapterFileError(
            f"{folder} holds an adapter; the base model's checkpoint was needed there. BASE comes first: merge BASE "
            "ADAPTER OUT, and verify ADAPTER MERGED --base BASE."
        )
    config = read_json(folder / "config.json")
    quantised = config.get("quantization_config")
    if quantised is not None:
        if not isinstance(quantised, dict):
            raise AdapterFileError(f"{folder} has the quantization_config {show(quantised)}; an object was expected.")
        method = quantised.get("quant_method")
        if method not in ("fp8", "mxfp4"):
            raise AdapterError(f"{folder} is quantised by {show(method)}; {_TAKEN}")
        _check_block(folder, quantised.get("weight_block_size"))
    tensors = AdapterTensors()
    if (folder / _SHARDED).is_file():
        open_shards(tensors, folder / _SHARDED)
    elif (folder / _SINGLE).is_file():
        refuse_outside(folder / _SINGLE, folder)  # as shards are, since what is in it is written anew
        open_safetensors(tensors, folder / _SINGLE)
    else:
        raise AdapterFileError(f"{_SINGLE} or {_SHARDED} was needed in {folder}. Save the base model as safetensors.")
    return Checkpoint(folder, config, tensors)


def _check_block(folder: Path, block: Any) -> None:
    fits = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if block is not None and not fits:
        raise AdapterFileError(f"{folder} has weight_block_size {show(block)}; two positive numbers were expected.")
