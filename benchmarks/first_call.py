"""What the first steps cost: `import`, the trial and the compilation of the kernels, and other token counts after that.

python benchmarks/first_call.py        (twice: the second finds triton's cache on disk)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from peft_moe_compat.cli import bench
from peft_moe_compat.patching import activation as patch

torch.zeros(1, device="cuda")
layer = bench._Layer(bench.Settings(bench.Shape(128, 8, 2048, 768)))
layer.add_lora()
patch.activate()
for tokens in (8192, 8192, 8000, 7777, 2048, 512, 64, 16, 1, 8192):
    both, forward = layer.steps(tokens)
    torch.cuda.synchronize()
    start = time.perf_counter()
    both()
    torch.cuda.synchronize()
    middle = time.perf_counter()
    forward()
    torch.cuda.synchronize()
    end = time.perf_counter()
    print(f"{tokens:6d} tokens: forward and backward {middle - start:8.4f} s, forward {end - middle:8.4f} s")
