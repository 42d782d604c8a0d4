"""Every script in examples/ does what its first line says, run as its docstring says."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

EXAMPLES = Path(__file__).parent.parent / "examples"
# Script -> what only its last step prints.
LAST = {
    "finetune_and_reload.py": r"largest difference of the logits after loading: \d",
    "old_adapter_made_readable.py": r"converted for peft==.*largest difference of an update: \d",
    "to_vllm.py": r"\d+ tensors, such as base_model\.model\.model\.layers\.\d+\.mlp\.experts\.7\.\w+_proj\.lora_",
    "trainer_and_trl.py": r"(?ms)^Trainer: loss .*^SFTTrainer: (loss|trl is not installed)",
    "two_gpus.py": r"saved to ",
    "watch_experts.py": r"layers\.7\.mlp\.experts: \d+ of 16 without a token",
}


def source(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def test_every_script_is_run_and_is_short():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(LAST)
    assert all(source(name).count("\n") < 60 for name in LAST)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="transformers 4 keeps Qwen3-MoE's experts as lists of linear layers, out of reach of target_parameters",
)
@pytest.mark.parametrize("name", LAST)
def test_the_command_in_the_docstring_works(name, tmp_path):
    docstring = ast.get_docstring(ast.parse(source(name)))
    words = shlex.split(re.search(r"^    (\S+ .*examples/\w+\.py)", docstring, re.MULTILINE).group(1))
    assert words[-1] == f"examples/{name}"
    interpreter = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    command = [sys.executable, *interpreter, *words[1:-1], EXAMPLES / name, tmp_path / "out"]
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | no_gpu, cwd=tmp_path, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.search(LAST[name], result.stdout), result.stdout
