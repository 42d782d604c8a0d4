"""What the fixtures' writers trained, as the readers' modules name it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

__all__ = ["FIXTURES", "base_config", "expected"]

FIXTURES = Path(__file__).parent.parent / "fixtures"
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_FUSED = {"gate_up_proj": "gate_up", "input_linear.weight": "gate_up", "output_linear.weight": "down"} | _ROLES


def expected(folder: Path, model_type: str) -> dict[tuple[int, int, str], Tensor]:
    """(layer, expert, role) -> update of the release that wrote the fixture, "out in"."""
    found: dict[tuple[int, int, str], Tensor] = {}
    for name, update in load_file(folder / "truth.safetensors").items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer is None or update.ndim < 2 or ("experts" not in name and "linear" not in name):
            continue
        one = re.search(r"\.(\d+)\.(\w+)$", name.partition("experts")[2])
        if one:
            found[int(layer[1]), int(one[1]), _ROLES[one[2]]] = update
            continue
        role = next(role for end, role in _FUSED.items() if name.endswith(f".{end}"))
        if role != "gate_up":
            parts = {role: update}
        elif model_type == "gpt_oss":
            parts = {"gate": update[:, ::2], "up": update[:, 1::2]}
        else:
            parts = dict(zip(("gate", "up"), update.chunk(2, dim=1), strict=True))
        for part, stack in parts.items():
            found.update({(int(layer[1]), expert, part): matrix for expert, matrix in enumerate(stack)})
    return found


def base_config(folder: Path) -> dict[str, Any]:
    truth = json.loads((folder / "truth.json").read_text())
    return json.loads((folder / "base_config.json").read_text()) | {"architectures": [truth["model_class"]]}
