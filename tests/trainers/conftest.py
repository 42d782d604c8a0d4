"""Each trainer's test runs where that trainer is installed, in an environment of its own (`tox -e axolotl`)."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = {
    "trl": "trl",
    "trl_vllm": "trl",
    "axolotl": "axolotl",
    "swift": "swift",
    "llamafactory": "llamafactory",
    "liger": "liger_kernel",
}
collect_ignore = [f"test_{name}.py" for name, module in MODULES.items() if find_spec(module) is None]
