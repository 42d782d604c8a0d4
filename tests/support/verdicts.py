"""Whether a conversion would change anything that a reader sees, told from the two files alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.errors import AdapterError
from peft_moe_compat.releases import NEWEST_TESTED, installed_versions

from .adapter_files import PREFIX, load, pattern_value, read_config


def targets_of_verdicts(verdicts: Iterable[str]) -> dict[str, str]:
    """Reader as `inspect` shows it -> as `--to` names it."""
    beside = installed_versions("transformers")["transformers"]
    found = {}
    for shown in verdicts:
        reader, *release = re.fullmatch(r"(\S+)(?: >= ([\d.]+)(, <.*)?)?", shown).groups()
        if reader == "PEFT":
            peft = release[0] if release[1] else NEWEST_TESTED
            found[shown] = f"peft=={peft},transformers=={beside}"
        else:
            found[shown] = reader.lower() + (f"=={release[0]}" if release[0] else "")
    return found


def unchanged(source: Path, out: Path, to: str, model: Any, how: Mapping[str, Any]) -> bool:
    """Whether a conversion goes through, and gives the same file as the reader sees it."""
    try:
        convert_adapter(source, out, to=to, model=model, **how)
    except AdapterError:
        return False
    before, after = load(source), load(out)
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        return False
    found = inspect_adapter(source, model=model, **how)
    modules = {m.path: [p.name for p in m.projections] for m in found.modules if m.form == "fused"}
    keys = lora_keys(source, modules)
    return as_read(read_config(source), to, keys) == as_read(read_config(out), to, keys)


def as_read(config: Mapping[str, Any], reader: str, keys: Sequence[str]) -> dict[str, Any]:
    """What a reader takes from adapter_config.json for the LoRA on `keys`, linears or parameters by their full names.

    Args:
        config: adapter_config.json.
        reader: As `--to` names it.
        keys: Of all LoRA in the file.
    """
    alpha, targets = config.get("lora_alpha"), config.get("target_modules")
    if reader == "llama.cpp":
        return {"alpha": alpha}
    if reader == "sglang":
        gate_up = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
        names = {t.rpartition(".")[2] for t in targets} if isinstance(targets, list) else {str(targets)}
        wanted = {gate_up.get(key.rpartition(".")[2], key.rpartition(".")[2]) for key in keys}
        return {"r": config.get("r"), "alpha": alpha, "missed": wanted - {gate_up.get(name, name) for name in names}}
    found: dict[str, Any] = {"use_rslora": bool(config.get("use_rslora"))}
    if re.fullmatch(r"vllm==0\.(28|29|30)", reader):  # no patterns there, and before 0.30 no rsLoRA of experts
        found |= {"r": config.get("r"), "alpha": alpha, "use_rslora": reader.endswith("30") and found["use_rslora"]}
        keys = ()
    for key in keys:
        rank, own = (pattern_value(config, *p, key) for p in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
        found[key] = rank, own
        if reader.startswith("peft"):
            several = targets if isinstance(targets, list) else []
            ends = [*several, *(config.get("target_parameters") or ())]
            reached = any(key == end or key.endswith(f".{end}") for end in ends)
            whole = isinstance(targets, str) and re.fullmatch(targets, key)
            found[f"{key} is reached"] = bool(reached or whole)
    if reader.startswith("vllm"):
        found |= {name: config.get(name) or None for name in ("modules_to_save", "lora_bias")}
        found["bias"] = config.get("bias") or "none"
    return found


def lora_keys(folder: Path, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Full names of everything with LoRA in a folder; `fused` has the parameters of each fused module."""
    found = [f"{path}.{name}" for path, names in fused.items() for name in names]
    for name in load(folder):
        path = name.removeprefix(PREFIX).partition(".lora_A")[0].replace(".base_layer", "")
        if ".lora_A" in name and path not in fused:
            found.append(path)
    return found
