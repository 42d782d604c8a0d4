"""Damage to the files of an adapter folder: headers, JSON, links, what lies beside. See `damages` for what may come."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
LAST = ("file_gone", "link")  # after them there may be nothing left to damage
OnFolder = Callable[[Path, random.Random], str]
ON_FOLDERS: dict[str, OnFolder] = {}


def _damage(function: OnFolder) -> OnFolder:
    ON_FOLDERS[function.__name__] = function
    return function


def _file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("adapter_model*.safetensors")))


def _parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data); of a file that was damaged before, as much as there is."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + size])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.keys() <= {"__metadata__"}:
        header = {"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    return header, raw[8 + size :] or b"\0\0\0\0"


def _write(file: Path, header: str | bytes, data: bytes, size: int | None = None) -> None:
    text = header.encode() if isinstance(header, str) else header
    file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


@_damage
def header_flipped(folder: Path, rng: random.Random) -> str:
    file = _file(folder, rng)
    raw = bytearray(file.read_bytes())
    size = min(8 + int.from_bytes(raw[:8], "little"), len(raw))
    if size:
        raw[rng.randrange(size)] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
    return "read"


@_damage
def header_entry(folder: Path, rng: random.Random) -> str:
    file = _file(folder, rng)
    header, data = _parts(file)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match entry:
        case {"data_offsets": [int(start), int(end)], "shape": list()}:
            pass
        case _:
            return "read"  # it was damaged before
    shapes = (entry["shape"][::-1], [1, *entry["shape"]], [], [-1, -1], [2**40, 2**40], ["a"], None, [1.0], [True])
    offsets = (
        [0, end],
        [end, start],
        [start, end + 4],
        [start + 4, end],
        [-4, end],
        [2**63, 2**64],
        [start],
        None,
        "x",
    )
    types = ("F64", "F16", "BF16", "I32", "BOOL", "f32", "F31", "F8_E4M3", "C64", None, 4, "F4", "I64", "U16")
    field, values = rng.choice((("shape", shapes), ("data_offsets", offsets), ("dtype", types)))
    entry[field] = rng.choice(values)
    if rng.random() < 0.15:
        header[name] = rng.choice((None, [], {}, 7, {**entry, "more": 1}))
    _write(file, json.dumps(header), data)
    return "read"


@_damage
def header_odd(folder: Path, rng: random.Random) -> str:
    file = _file(folder, rng)
    header, data = _parts(file)
    text = json.dumps(header)
    first = next(name for name in header if name != "__metadata__")
    deep = "[" * 200_000 + "]" * 200_000
    ways: tuple[tuple[str | bytes, int | None], ...] = (
        (text, 0),
        (text, 2**63),
        (text, len(text) - 1),
        (text, len(text) + 1),
        (text, len(text) + len(data)),
        (text + " " * 1000, None),
        ("\ufeff" + text, None),
        (text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}", None),
        (text[:-1] + ', "__metadata__": {"a": "b"}}', None),
        (json.dumps({**header, "__metadata__": {"a": 1}}), None),
        (json.dumps({**header, "__metadata__": []}), None),
        (json.dumps({**header, "x": {"a": {"b": []}}}), None),
        (text[:-1] + f', "x": {deep}}}', None),
        (deep, None),
        ("{}", None),
        ("null", None),
        (b"\xff\xfe" + text.encode(), None),
        (text[:-1] + ', "\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', None),
        (text[:-1] + ', "\\u001b[31m": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', None),
        (text[:-1] + f', "many": {{"dtype": "F32", "shape": {[1] * 100_000}, "data_offsets": [0, 4]}}}}', None),
    )
    changed, size = rng.choice(ways)
    _write(file, changed, data, size)
    return "any"


@_damage
def length_changed(folder: Path, rng: random.Random) -> str:
    file = _file(folder, rng)
    raw = file.read_bytes()
    file.write_bytes(
        rng.choice((raw[:-1], raw[:-64], raw + b"\0", raw + raw, raw[:8], raw[:4], b"", raw[: len(raw) // 2]))
    )
    return "read"


@_damage
def data_flipped(folder: Path, rng: random.Random) -> str:
    file = _file(folder, rng)
    raw = bytearray(file.read_bytes())
    if raw:
        raw[len(raw) - 1 - rng.randrange(len(raw)) // 2] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
    return "read"


@_damage
def json_odd(folder: Path, rng: random.Random) -> str:
    file = folder / rng.choice((CONFIG, CONFIG, "adapter_model.safetensors.index.json"))
    if not file.is_file():
        return "same"
    text = file.read_bytes()
    ways = (
        *(
            b"",
            b"null",
            b"[]",
            b"7",
            b'"x"',
            text[:-2],
            text + b"x",
            b"\xef\xbb\xbf" + text,
            b"\xff" + text,
            b"{" * 10**5,
        ),
        *(text.replace(b'"r"', b'"r": 9, "r"'), b"[" * 10**6, b'{"a": ' * 5000 + b"1" + b"}" * 5000, b"{}"),
        *(
            text.replace(b": ", b': NaN, "x": ', 1),
            text.decode(errors="replace").encode("utf-16"),
            text.replace(b"{", b'{"\\ud800": 1, ', 1),
        ),
        *(b'{"r": ' + b"9" * 10**6 + b"}", text.replace(b'"lora_alpha"', b'"lora_alpha": -Infinity, "q"')),
    )
    file.write_bytes(rng.choice(ways))
    return "any"


@_damage
def index_edited(folder: Path, rng: random.Random) -> str:
    file = folder / "adapter_model.safetensors.index.json"
    if not file.is_file():
        return "same"
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        content = None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        return "same"  # it was damaged before
    name = rng.choice(list(weight_map))
    values: tuple[Any, ...] = (
        "../x.safetensors",
        "/dev/zero",
        "",
        ".",
        None,
        7,
        "none.safetensors",
        "a\0b",
        "x" * 5000,
    )
    if rng.random() < 0.6:
        weight_map[name] = rng.choice(values)
    elif rng.random() < 0.5:
        del weight_map[name]
    else:
        content["weight_map"] = rng.choice(([], {}, None, "x", {"a": "b"}))
    file.write_text(json.dumps(content))
    return "same"


@_damage
def beside_files(folder: Path, rng: random.Random) -> str:
    way = rng.randrange(6)
    if way == 0:
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    elif way == 1:
        (folder / "README.md").write_text("x")
        (folder / "optimizer.pt").write_bytes(b"x")
    elif way == 2:
        (folder / "more").mkdir(exist_ok=True)
        (folder / "more" / "adapter_model.safetensors").write_bytes(b"x")
    elif way == 3 and not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    elif way == 4:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_bytes(b"x")
    else:
        (folder / "adapter_model.safetensors.tmp").write_bytes(b"x" * 9)
    return "same"


@_damage
def automodel_file(folder: Path, rng: random.Random) -> str:
    contents: tuple[Any, ...] = (
        *({}, [], None, {"paramwrapper_layout": "peft-0.18"}, {"paramwrapper_layout": 7}, {"paramwrapper_layout": []}),
        *({"moe_rank_scaling": True}, {"moe_rank_scaling": "x", "paramwrapper_layout": "peft-0.19.1"}),
    )
    (folder / "automodel_peft_config.json").write_text(json.dumps(rng.choice(contents)))
    return "any"


@_damage
def file_gone(folder: Path, rng: random.Random) -> str:
    gone = rng.choice(sorted(folder.glob("adapter_*")))
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    return "any"


@_damage
def link(folder: Path, rng: random.Random) -> str:
    """A file moved aside, and a link to it, or to what is no file."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink()))
    whole = file.read_bytes()
    file.unlink()
    way = rng.choice(
        ("good", "good", "/dev/zero", "/dev/null", "/dev/tty", "loop", "folder", "pipe", "nowhere", "/proc/self/mem")
    )
    if way == "good":
        aside = folder / f"aside of {file.name}"
        aside.write_bytes(whole)
        file.symlink_to(aside.name)
        return "same"
    if way == "pipe":
        os.mkfifo(file)
    elif way == "folder":
        file.mkdir()
    else:
        file.symlink_to(file.name if way == "loop" else way)
    return "any"
