"""What llama.cpp applies of a LoRA folder on MoE experts, by way of its own `convert_lora_to_gguf.py`.

Real: the vendored `convert_lora_to_gguf.py` with its `conversion` package, run in a process of its own on a folder that
holds nothing but the base model's config.json, and the vendored `gguf` that reads its output. As importing torch and
transformers takes longer than converting, the processes are forks of one that has done so (`_serve`).

Test doubles, of C++ that is not built here: the shape check of `llama_adapter_lora_init_impl` (src/llama-adapter.cpp),
the scale of `llama_adapter_lora_weight::get_scale` (src/llama-adapter.h) and the two products of `build_lora_mm_id`
(src/llama-graph.cpp), all of the llama.cpp in llama-cpp-python 0.3.36. Not checked: that the base model has a tensor of
each name.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ConversionError", "read"]

_NAME = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight\.lora_([ab])")


class ConversionError(RuntimeError):
    """`convert_lora_to_gguf.py` refused; the message is the last line of its output."""


def _sources() -> Path:
    return Path(os.environ["PEFT_MOE_COMPAT_READERS"]) / "llama.cpp"


@functools.cache
def _gguf(sources: Path) -> Any:
    sys.path.insert(0, str(sources / "gguf-py"))
    try:
        return importlib.import_module("gguf")
    finally:
        sys.path.remove(str(sources / "gguf-py"))


def convert(folder: Path, base_config: Mapping[str, Any], outfile: Path) -> None:
    """Runs the real converter, offline.

    Raises:
        ConversionError: It refused.
    """
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "config.json").write_text(json.dumps(base_config), encoding="utf-8")
        script = _sources() / "convert_lora_to_gguf.py"
        log = Path(base) / "log"
        arguments = [str(script), "--base", base, "--outfile", str(outfile), str(folder)]
        server = _server()
        print(json.dumps([arguments, str(log)]), file=server.stdin, flush=True)
        answer = server.stdout.readline().strip()
        if answer != "0":
            lines = log.read_text(encoding="utf-8").strip().splitlines() if log.is_file() else []
            raise ConversionError(lines[-1] if lines else f"the converter's process ended with {answer!r}")


@functools.cache
def _server() -> Any:
    """The process that forks converters; it ends when its standard input closes with this one."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", __file__]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    """For each line [arguments, log] on standard input: runs the script in a fork, and answers with its exit status."""
    importlib.import_module("safetensors.torch")
    transformers = importlib.import_module("transformers")
    assert transformers.AutoConfig
    assert transformers.AutoTokenizer
    for line in sys.stdin:
        arguments, log = json.loads(line)
        child = os.fork()
        if not child:
            target = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(target, 1)
            os.dup2(target, 2)
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
            return
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def read(folder: Path, base_config: Mapping[str, Any]) -> dict[tuple[int, int, str], Tensor]:
    """(layer, expert, "gate" | "up" | "down") -> the update "out in" in float64 that llama.cpp adds.

    Raises:
        ConversionError: The converter refused the folder.
        ValueError: The runtime would refuse the shapes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outfile = Path(scratch) / "adapter.gguf"
        convert(folder, base_config, outfile)
        reader = _gguf(_sources()).GGUFReader(outfile)
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        tensors = {t.name: torch.tensor(t.data, dtype=torch.float64) for t in reader.tensors}
    return _updates(tensors, alpha, {**base_config, **(base_config.get("text_config") or {})})


def _updates(
    tensors: Mapping[str, Tensor], alpha: float, text: Mapping[str, Any]
) -> dict[tuple[int, int, str], Tensor]:
    hidden, intermediate = int(text["hidden_size"]), int(text.get("moe_intermediate_size") or text["intermediate_size"])
    found: dict[tuple[int, int, str], Tensor] = {}
    for name, a in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match[3] != "a":
            continue
        b = tensors[name.removesuffix("a") + "b"]
        inputs, outputs = (intermediate, hidden) if match[2] == "down" else (hidden, intermediate)
        if a.shape[2] != inputs or b.shape[1] != outputs or a.shape[1] != b.shape[2]:
            raise ValueError(f"tensor {name!r} has incorrect shape: {tuple(a.shape)} and {tuple(b.shape)}")
        rank = b.shape[2]
        scale = alpha / rank if alpha else 1.0
        for expert in range(a.shape[0]):
            found[int(match[1]), expert, match[2]] = scale * b[expert] @ a[expert]
    return found


if __name__ == "__main__":
    _serve()
