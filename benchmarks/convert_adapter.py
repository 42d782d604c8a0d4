"""Time and memory of converting a large adapter: `python benchmarks/convert_adapter.py FOLDER [--layers N] [--rank R]`.

Writes a synthetic adapter as PEFT 0.18.1 would (Qwen3-30B-A3B: 128 experts, hidden size 2048, intermediate size 768;
48 layers of rank 32 are 5 GB) into FOLDER, converts it for PEFT 0.21.2 and for vLLM with the command line, and prints
wall time and peak resident memory of each, beside those of copying the file. FOLDER needs three times the adapter's
size; what is written is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# No torch here: a child's peak starts from its parent's.
EXPERTS, HIDDEN, INTERMEDIATE = 128, 2048, 768


def plan(layers: int, rank: int) -> list[tuple[str, tuple[int, ...], Any]]:
    """As PEFT 0.17 to 0.18 lay it out: lora_A spans the out-features."""
    import torch

    found = []
    for layer in range(layers):
        stem = f"base_model.model.model.layers.{layer}.mlp.experts"
        for name, fan_in, fan_out in ((".base_layer", HIDDEN, 2 * INTERMEDIATE), ("", INTERMEDIATE, HIDDEN)):
            found.append((f"{stem}{name}.lora_A.weight", (EXPERTS * rank, fan_out), torch.float32))
            found.append((f"{stem}{name}.lora_B.weight", (fan_in, EXPERTS * rank), torch.float32))
    return found


def write(folder: Path, layers: int, rank: int) -> int:
    import torch

    from peft_moe_compat.adapters.safetensors_io import write_safetensors

    entries = plan(layers, rank)

    def tensors() -> Iterator[tuple[str, Any]]:
        for name, shape, dtype in entries:
            yield name, torch.randn(shape, dtype=dtype)

    write_safetensors(folder / "adapter_model.safetensors", entries, tensors(), {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "peft_version": "0.18.1",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "hidden_size": HIDDEN}
    base["moe_intermediate_size"] = INTERMEDIATE
    (folder / "config.json").write_text(json.dumps(base))
    return (folder / "adapter_model.safetensors").stat().st_size


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MB resident) of a command, its output flushed to disk."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6  # KiB on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    folder = arguments.folder / "convert-benchmark"
    source = folder / "source"
    made_too = not arguments.folder.exists()
    source.mkdir(parents=True)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            size = apart.submit(write, source, arguments.layers, arguments.rank).result() / 1e9
        print(f"adapter of {size:.2f} GB")
        cli = [sys.executable, "-c", "from peft_moe_compat.cli.main import app; app()", "convert", str(source)]
        commands = {
            "cp": ["cp", "-r", str(source), str(folder / "copy")],
            "import alone": [sys.executable, "-c", "import peft_moe_compat.adapters.convert"],
            "--to peft==0.21.2": [*cli, str(folder / "peft"), "--to", "peft==0.21.2", "--model", str(source)],
            "--to vllm": [*cli, str(folder / "vllm"), "--to", "vllm", "--model", str(source)],
        }
        for name, command in commands.items():
            seconds, peak = run(command)
            print(f"{name:20} {seconds:7.1f} s  {size / seconds:5.2f} GB/s  {peak:6.0f} MB peak", flush=True)
            for made in ("copy", "peft", "vllm"):
                shutil.rmtree(folder / made, ignore_errors=True)
    finally:
        shutil.rmtree(arguments.folder if made_too else folder)


if __name__ == "__main__":
    main()
