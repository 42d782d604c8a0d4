"""Adapter folders and base configs made to hang their reader, to eat its memory, or to raise what is not its own.

Each entry of `FOLDERS` damages a good folder of `Spec()`; each of `MODELS` is a base model's config instead of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.adapter_files import PREFIX, load, read_config, save
from support.limits import seconds
from support.tensor_files import SINGLE, allocating_at_most

CONFIG = "adapter_config.json"
EXPERTS = f"{PREFIX}model.layers.0.mlp.experts"
SECONDS, BYTES = 5, 2**30


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Time and memory beyond what is in use."""
    begin = time.process_time()
    with allocating_at_most(BYTES):
        yield
    assert time.process_time() - begin < seconds(SECONDS)


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**read_config(folder), **values}))

    return change


def _text(make: Callable[[], bytes], name: str = CONFIG) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(make())

    return change


def _tensors(tensors: Callable[[], dict[str, Tensor]], *, more: bool = False, **config: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = (load(folder) if more else {}) | tensors()
        save(folder, found, {**read_config(folder), **config})

    return change


def _pair(stem: str, r: int = 2, fan_in: int = 8, fan_out: int = 6) -> dict[str, Tensor]:
    return {f"{stem}.lora_A.weight": torch.ones(r, fan_in), f"{stem}.lora_B.weight": torch.ones(fan_out, r)}


def _nested(levels: int, names: int) -> Callable[[Path], None]:
    tensors: dict[str, Tensor] = {}
    for level in range(levels):
        stem = EXPERTS + ".base_layer" * level
        tensors |= {f"{stem}.lora_A.weight": torch.ones(8, 8), f"{stem}.lora_B.weight": torch.ones(8, 8)}
    return _tensors(lambda: tensors, target_parameters=[f"experts.p{i}" for i in range(names)])


def _many_layers(folder: Path) -> None:
    """Twenty thousand modules, each targeted by its full name."""
    paths = [f"model.layers.{i}.mlp.experts" for i in range(20_000)]
    tensors = {}
    for path in paths:
        tensors |= {
            f"{PREFIX}{path}.lora_A.weight": torch.ones(2, 1),
            f"{PREFIX}{path}.lora_B.weight": torch.ones(1, 2),
        }
    targets = [f"{path}.{name}" for path in paths for name in ("gate_up_proj", "down_proj")]
    save(folder, tensors, {**read_config(folder), "target_parameters": targets})


def _many_linears(count: int) -> Callable[[Path], None]:
    """Each with an alpha, by a pattern and a target of its own."""
    paths = [f"model.layers.{i}.self_attn.v_proj" for i in range(count)]
    return _tensors(
        lambda: {k: v for path in paths for k, v in _pair(PREFIX + path, 1, 4, 4).items()},
        more=True,
        alpha_pattern={path.removeprefix("model."): i + 1 for i, path in enumerate(paths)},
        target_modules=paths,
    )


def _header(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _empty_tensors(count: int) -> bytes:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"x{i}":{entry}' for i in range(count)) + "}").encode()


def _linked(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def _pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def _stamp(text: str) -> Callable[[Path], None]:
    return lambda folder: save(folder, load(folder), read_config(folder), metadata={"peft_moe_compat": text})


def _good_stamp(**values: Any) -> str:
    module = {"num_experts": 4, "nesting": ["gate_up_proj", "down_proj"], "orientation": "linear"}
    module |= {"features": [[8, 12], [6, 8]], **values}
    content = {"peft": "0.21.2", "transformers": None, "packing": "rank_major"}
    return json.dumps({**content, "modules": {"model.layers.0.mlp.experts": module}})


def _misfit(folder: Path) -> None:
    tensors = load(folder)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name] = torch.ones(8, 5)
    save(folder, tensors, read_config(folder))


def _sparse(folder: Path) -> None:
    size = 2**36
    entries = {
        f"{EXPERTS}.lora_A.weight": {"dtype": "F32", "shape": [8, size // 64], "data_offsets": [0, size // 2]},
        f"{EXPERTS}.lora_B.weight": {"dtype": "F32", "shape": [size // 64, 8], "data_offsets": [size // 2, size]},
    }
    raw = _header(json.dumps(entries).encode())
    with (folder / SINGLE).open("wb") as stream:
        stream.write(raw)
        stream.truncate(len(raw) + size)


def _index(value: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(load(folder), value)}))
        (folder / SINGLE).unlink()

    return change


def _shards(count: int, each: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        files = {
            f"m{shard}.safetensors": _empty_tensors(each).replace(b'"x', b'"%dx' % shard) for shard in range(count)
        }
        for name, header in files.items():
            (folder / name).write_bytes(_header(header))
        weight_map = {f"{shard}x{i}": f"m{shard}.safetensors" for shard in range(count) for i in range(each)}
        (folder / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / SINGLE).unlink()

    return change


FOLDERS: dict[str, Callable[[Path], None]] = {
    "an exponential pattern": _config(rank_pattern={"(.*a|.*b|.*c)*(x+x+)+y": 2}),
    "an exponential pattern of alphas": _config(alpha_pattern={"([a-z._0-9]+)+!": 2}),
    "20,000 patterns": _config(alpha_pattern={f".*x{i}[0-9]*": 2 for i in range(20_000)}),
    "nested groups": _config(rank_pattern={"(" * 3000 + ")" * 3000: 2}),
    "an exponential target": _config(target_modules="(([a-z._0-9]+)+)+!"),
    "an exponential exclusion": _config(exclude_modules="([a-z._0-9]+)+!"),
    "an exponential layer": _config(layers_pattern="([a-z._0-9]+)+!", layers_to_transform=[0]),
    "an exponential layer among others": _config(layers_pattern=["h", "([a-z._0-9]+)+!"], layers_to_transform=[0]),
    "an exponential module to save": _config(modules_to_save=["lm_head", "([a-z._0-9]+)+!"]),
    "a module to save of a megabyte": _config(modules_to_save=["a" * 10**6]),
    "4,000 replicated layers": _config(layer_replication=[[0, 2]] * 2000),
    "a billion replicated layers": _config(layer_replication=[[0, 10**9]]),
    **{
        f"200,000 entries in {field}": _config(**{field: [f"x{i}" for i in range(200_000)]})
        for field in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
    },
    "100,000 layers to transform": _config(layers_to_transform=list(range(10**5))),
    "a number of an expert": _tensors(lambda: _pair(f"{EXPERTS}.999999999.up_proj")),
    "a number of an expert of five digits": _tensors(lambda: _pair(f"{EXPERTS}.99999.up_proj")),
    "a number of an expert of 400 digits": _tensors(lambda: _pair(f"{EXPERTS}.{'9' * 400}.up_proj")),
    "one expert of 16,383": _tensors(lambda: _pair(f"{EXPERTS}.16383.up_proj", 64, 4096, 4096)),
    "a long name": _tensors(lambda: _pair(f"{EXPERTS}.{'a.' * 100_000}b"), more=True),
    "a name that steers the terminal": _tensors(lambda: _pair("\x1b]0;x\x07.experts"), more=True),
    "eight wrappers": _nested(8, 8),
    "two wrappers and 200 names": _nested(2, 200),
    "two wrappers and 60 names": _nested(2, 60),
    "20,000 layers": _many_layers,
    "6,000 linears": _many_linears(6_000),
    "12,000 deep names": _text(lambda: _header(_empty_tensors(12_000).replace(b'"x', b'"' + b"moe." * 100)), SINGLE),
    "12,000 embeddings": _text(
        lambda: _header(_empty_tensors(12_000).replace(b'":{"d', b'.lora_embedding_A":{"d')), SINGLE
    ),
    "60 MB of lists": _text(lambda: b'{"r": 2, "x": [' + b"[]," * (20 * 2**20) + b"1]}"),
    "60 MB of one text": _text(lambda: b'{"r": 2, "peft_version": "' + b"x" * (60 * 2**20) + b'"}'),
    "60 MB of digits": _text(lambda: b'{"r": 2, "lora_alpha": 0.' + b"1" * (60 * 2**20) + b"}"),
    "deep lists": _text(lambda: b'{"r": 2, "x": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "deeper lists": _text(lambda: b'{"r": 2, "x": ' + b"[" * 10**6 + b"]" * 10**6 + b"}"),
    "a header of 90 MB": _text(lambda: _header(b"{" + b" " * (90 * 2**20) + b"}"), SINGLE),
    "a header of 350,000 tensors": _text(lambda: _header(_empty_tensors(350_000)), SINGLE),
    "shards of 100,000 tensors": _shards(4, 100_000),
    "metadata of 60 MB": _stamp("x" * (60 * 2**20)),
    "a sparse file of 64 GB": _sparse,
    "a linear whose factors do not fit": _misfit,
    "a linear of integers": _tensors(
        lambda: {name: factor.to(torch.int8) for name, factor in _pair(f"{PREFIX}lm_head").items()}, more=True
    ),
    "a linear of complex numbers": _tensors(
        lambda: {name: factor.to(torch.complex64) for name, factor in _pair(f"{PREFIX}lm_head").items()}, more=True
    ),
    **{
        f"a name of {levels} base_layer alone": _tensors(
            lambda levels=levels: _pair(PREFIX + ".".join(["base_layer"] * levels)), more=True
        )
        for levels in (2, 40)
    },
    "a linear without columns": _tensors(lambda: _pair(f"{PREFIX}lm_head", 2, 0, 6), more=True),
    "a linear of rank 0": _tensors(lambda: _pair(f"{PREFIX}lm_head", 0), more=True),
    "target_parameters that are a number": _config(target_parameters=1.5),
    "a base model with a broken name": _config(base_model_name_or_path="\ud800\x1b[2J"),
    "a version of 5,000 digits": _config(peft_version="9" * 5000),
    "a version that is an object": _config(peft_version={"a": 1}),
    **{f"{name} links to /dev/zero": _linked(name, "/dev/zero") for name in (CONFIG, SINGLE)},
    **{f"{name} links to itself": _linked(name, name) for name in (CONFIG, SINGLE)},
    **{f"{name} is a pipe": _pipe(name) for name in (CONFIG, SINGLE, f"{SINGLE}.index.json")},
    "an index of a file of 4,000 letters": _index("a" * 4000),
    "automodel's file is a pipe": _pipe("automodel_peft_config.json"),
    **{
        f"stamp {at}": _stamp(text)
        for at, text in enumerate(
            (
                "[" * 10**5,
                "null",
                "[]",
                '{"modules": {}}',
                _good_stamp(num_experts=float("inf")),
                _good_stamp(num_experts=10**400),
                _good_stamp(num_experts=True),
                _good_stamp(nesting=["\ud800", "down_proj"]),
                _good_stamp(nesting=[["gate_up_proj"], {}]),
                _good_stamp(nesting="ab"),
                _good_stamp(orientation=["linear"]),
                _good_stamp(features=[[8, float("nan")], [6, 8]]),
                _good_stamp(features=[[8, 12, 3], [6, 8]]),
                _good_stamp(joined=[1]),
                _good_stamp(joined={"0": 1}),
                _good_stamp().replace("0.21.2", "9" * 5000),
                _good_stamp().replace("rank_major", "a"),
                _good_stamp().replace('"rank_major"', "[1]"),
                _good_stamp().replace('"transformers": null', '"transformers": "\\ud800"'),
                _good_stamp().replace('"transformers": null', '"transformers": {}'),
            )
        )
    },
}

_SIZES = {"model_type": "qwen3_moe", "hidden_size": 8, "moe_intermediate_size": 6}
MODELS: dict[str, dict[str, Any]] = {
    "a billion experts": {**_SIZES, "num_experts": 10**9},
    "more experts than a number holds": {**_SIZES, "num_experts": 10**400},
    "16,000 experts": {**_SIZES, "num_experts": 16_000},
    "a billion zero experts": {**_SIZES, "num_experts": 4, "zero_expert_num": 10**9},
    "a million sizes": {**_SIZES, "num_experts": 4, "hidden_size": list(range(1, 900_000))},
    "many parts": {str(i): {**_SIZES, "num_experts": 4} for i in range(90_000)},
    "a type that is a list": {**_SIZES, "num_experts": 4, "model_type": ["qwen3_moe"]},
    "a type that is no name": {**_SIZES, "num_experts": 4, "model_type": "\x1b[2J" * 10_000},
}
