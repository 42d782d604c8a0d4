"""The command line on the files of a case: an exit code it says it has, JSON where asked, and no traceback."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fuzz.cases import Case
from fuzz.families import FAMILIES
from fuzz.guarded import guarded
from fuzz.made import Adapter
from fuzz.oracle import Meaning, in_one_place
from fuzz.takes import ViolationError, refusable


def _weights(case: Case, meaning: Meaning) -> dict[str, Tensor]:
    """What has to be added to which weight of the base, by its name in a checkpoint of the Hub."""
    family = FAMILIES[case.family]
    stacks: dict[tuple[int, str], Tensor] = {}
    for layer in {layer for layer, _ in meaning.experts}:
        for role in family.apart_roles:
            fan_in, fan_out = family.size(role, case.H, case.I)
            none = torch.zeros(case.E, fan_out, fan_in, dtype=torch.float64)
            stacks[layer, role] = meaning.experts.get((layer, role), none)
    # Whatever stands before the layers in the adapter, merging finds the base's.
    before = family.path.partition("layers.")[0]
    linears = in_one_place(meaning.linears)
    places = {path: re.sub(r"^(.*?\.)??(?=layers\.[0-9])", before, path) for path in linears}
    found = {f"{places[path]}.weight": update for path, update in linears.items()}
    if not family.fused_in_4:
        for (layer, role), stack in stacks.items():
            path = family.apart_path().format(layer)
            found |= {f"{path}.{e}.{family.linear(role)}.weight": one for e, one in enumerate(stack)}
        return found
    for layer in {layer for layer, _ in stacks}:  # all of these have a gate
        both = torch.empty(case.E, 2 * case.I, case.H, dtype=torch.float64)
        for part, rows in family.halves(2 * case.I).items():
            both[:, rows] = stacks[layer, part]
        for role, stack in (("gate_up", both), ("down", stacks[layer, "down"])):
            path, name = family.place(role, "4.57.6")
            found[f"{path.format(layer)}.{name}"] = stack.transpose(1, 2) if family.transposed else stack
    return found


def _base(case: Case, adapter: Adapter, folder: Path) -> dict[str, Tensor]:
    """Writes a base model that has what the undamaged adapter is for."""
    folder.mkdir()
    said = adapter.said.get("model", adapter.model)
    (folder / "config.json").write_text(json.dumps(said if isinstance(said, dict) else adapter.model))
    generator = torch.Generator().manual_seed(case.seed)
    shapes = {name: update.shape for name, update in _weights(case, adapter.meaning).items()}
    shapes |= {name.removeprefix("base_model.model."): tensor.shape for name, tensor in adapter.meaning.rest.items()}
    base = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(base))
    return base


def _invoke(arguments: list[str]) -> Any:
    from typer.testing import CliRunner

    from peft_moe_compat.cli.main import app

    result = guarded(arguments[0], CliRunner().invoke, app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        what = f"{type(result.exception).__name__}: {result.exception}"
        raise ViolationError(f"the command {arguments[0]} raises", what[:300]) from result.exception
    if result.exit_code not in (0, 1, 2) or (result.exit_code == 1 and arguments[0] != "verify"):
        raise ViolationError(f"the command {arguments[0]} ends oddly", f"{result.exit_code}: {result.output[:300]}")
    if "--json" in arguments:
        json.loads(result.stdout)
    return result.exit_code


def check_commands(
    case: Case, adapter: Adapter, folder: Path, scratch: Path, meaning: Meaning | str | None, tally: Counter[str]
) -> None:
    """Runs every command that takes an adapter, with what the caller says as options.

    Raises:
        ViolationError: One ends in a traceback or in no code of its own, or what was merged is not the sum.
    """
    base = _base(case, adapter, scratch / "base")
    model = adapter.said.get("model")
    said = {} if model is None else {"model": model if isinstance(model, str) else str(scratch / "base")}
    said |= {name: adapter.said[name] for name in ("orientation", "packing") if name in adapter.said}
    if "nesting" in adapter.said:
        said["nesting"] = ",".join(adapter.said["nesting"])
    options = [f"--{name}={value}" for name, value in said.items()]
    json_too = ["--json"] if case.seed % 2 else []
    _invoke(["inspect", str(folder), *options, *json_too])
    to, out = case.to[0], scratch / "out"
    rename = [f"--rename={old}={new}" for old, new in adapter.rename.items()]
    how = [*options, *rename, "--fill-missing", "--allow-lossy", *json_too]
    code = _invoke(["convert", str(folder), str(out), f"--to={to}", *how])
    tally[f"commands: convert {code}"] += 1
    if out.exists() != (code == 0):
        raise ViolationError("convert's exit code is wrong", f"{code} and {'a' if out.exists() else 'no'} folder")
    if (
        code
        and not case.damages
        and case.told
        and case.model
        and not (refusable(case, to) or (case.renamed and case.patterns))
    ):
        raise ViolationError("the command convert refuses a good file", to)
    if code == 0:
        _invoke(["verify", str(folder), str(out), *options, *json_too])
    merged = scratch / "merged"
    code = _invoke(["merge", str(scratch / "base"), str(folder), str(merged), *options, *json_too])
    tally[f"commands: merge {code}"] += 1
    if code or meaning is None:
        return
    if not isinstance(meaning, Meaning):
        raise ViolationError("merge takes a file that means nothing", str(meaning))
    tensors = safetensors.torch.load((merged / "model.safetensors").read_bytes())
    updates = _weights(case, meaning)
    for name, before in base.items():
        whole = next((one for full, one in meaning.rest.items() if full.endswith(f".{name}")), before).double()
        expected = whole + updates.get(name, torch.zeros(()))
        if (tensors[name] - expected).abs().max() > 1e-6 * expected.abs().max():
            raise ViolationError("merge writes another sum", name)
