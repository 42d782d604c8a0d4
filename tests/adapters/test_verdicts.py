"""`reads` is said of a reader exactly where a conversion for it changes nothing; tests/readers asks the readers."""

from __future__ import annotations

import json

import pytest
import torch
from support.adapter_files import (
    FAMILIES,
    GPT_OSS,
    MIXTRAL,
    PREFIX,
    QWEN,
    Family,
    Spec,
    load,
    read_config,
    save,
    save_fused,
    save_per_expert,
    save_stacked,
)
from support.verdicts import targets_of_verdicts, unchanged

from peft_moe_compat.adapters.config_fields import CHANGES
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.readers import READERS
from peft_moe_compat.adapters.steps import Step

FLAGS = {"packing": "rank_major"}
HEAD = {f"{PREFIX}lm_head.weight": torch.ones(16, 8)}
MOVED = Family(**{**vars(MIXTRAL), "apart": MIXTRAL.fused})


def fused(spec, roles=None, **how):
    return lambda folder: save_fused(folder, spec, spec.factors(roles or spec.fused_roles()), **how), spec


def apart(spec, roles=None, **how):
    return lambda folder: save_per_expert(folder, spec, spec.factors(roles or spec.linear_roles()), **how), spec


def stacked(spec, roles=None, **how):
    return lambda folder: save_stacked(folder, spec, spec.factors(roles or spec.fused_roles()), **how), spec


def with_a_router(spec):
    gate = "model.layers.0.mlp.gate"
    extra = {f"{PREFIX}{gate}.lora_A.weight": torch.ones(2, 8), f"{PREFIX}{gate}.lora_B.weight": torch.ones(4, 2)}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    return fused(spec, extra=extra, target_parameters=targets)


def sharded(spec):
    def write(folder):
        save_per_expert(folder, spec, spec.factors(spec.linear_roles()))
        shard = folder / "adapter_model-00001-of-00001.safetensors"
        (folder / "adapter_model.safetensors").rename(shard)
        index = {"weight_map": dict.fromkeys(torch_names(shard), shard.name)}
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write, spec


def torch_names(file):
    import safetensors

    with safetensors.safe_open(file, "pt") as opened:
        return list(opened.keys())


def unprefixed(spec):
    def write(folder):
        save_per_expert(folder, spec, spec.factors(spec.linear_roles()))
        return save(folder, {n.removeprefix(PREFIX): t for n, t in load(folder).items()}, read_config(folder))

    return write, spec


CASES = {
    **{f"fused {family.model_type}": fused(Spec(family)) for family in FAMILIES},
    **{f"per expert {family.model_type}": apart(Spec(family)) for family in FAMILIES},
    **{f"stacked {family.model_type}": stacked(Spec(family)) for family in FAMILIES},
    "fused, reversed": fused(Spec(), orientation="reversed"),
    "fused, square, reversed": fused(Spec(I=8), ("down",), orientation="reversed", peft_version="0.18.1"),
    "fused, nested the other way": fused(Spec(), nesting=QWEN.parameters[::-1]),
    "fused, rsLoRA": fused(Spec(rslora=True)),
    "fused, ranks": fused(Spec(GPT_OSS, ranks={"down": 3}, alphas={"down": 5})),
    "fused, down alone": fused(Spec(GPT_OSS), ("down",)),
    "fused, a saved head": fused(Spec(GPT_OSS), extra=HEAD, modules_to_save=["lm_head"]),
    "fused, no targets": fused(Spec(), target_parameters=None),
    "fused, a router": with_a_router(Spec()),
    "fused, no bias said": fused(Spec(GPT_OSS), bias=None),
    "fused, attention": fused(Spec(GPT_OSS, attention=True)),
    "per expert, rsLoRA": apart(Spec(rslora=True)),
    "per expert, ranks": apart(Spec(ranks={"down": 3})),
    "per expert, alphas": apart(Spec(alphas={"down": 5})),
    "per expert, a pattern that changes nothing": apart(Spec(alphas={"down": 3})),
    "per expert, attention": apart(Spec(attention=True)),
    "per expert, down alone": apart(Spec(), ("down",)),
    "per expert, one without": apart(Spec(), skip=[(1, "up")]),
    "per expert, under mlp": apart(Spec(MOVED)),
    "per expert, a saved head": apart(Spec(), extra=HEAD, modules_to_save=["lm_head"]),
    "per expert, a head in the config alone": apart(Spec(), modules_to_save=["lm_head"]),
    "per expert, pissa": apart(Spec(), init_lora_weights="pissa"),
    "per expert, targets by a pattern": apart(Spec(), target_modules=r".*experts\.\d+\..*_proj"),
    "per expert, targets with dots": apart(
        Spec(), target_modules=[f"experts.{e}.{name}" for e in range(4) for name in QWEN.linears]
    ),
    "per expert, an alpha of zero": apart(Spec(alpha=0)),
    "per expert, sharded": sharded(Spec()),
    "per expert, without a prefix": unprefixed(Spec()),
    "stacked, down alone": stacked(Spec(), ("down",), target_modules=["down_proj"]),
}


@pytest.mark.parametrize("case", CASES)
def test_reads_is_said_exactly_where_nothing_would_change(tmp_path, case):
    write, spec = CASES[case]
    source = write(tmp_path / "in")
    found = inspect_adapter(source, model=spec.model(), **FLAGS)
    for shown, to in targets_of_verdicts(found.readers).items():
        verdict = found.readers[shown]
        same = "sharded" not in case and unchanged(source, tmp_path / shown, to, spec.model(), FLAGS)
        assert (verdict.verdict == "reads") is same, (shown, verdict)
        assert same or verdict.why


@pytest.mark.parametrize("reader", READERS)
def test_what_is_known_of_a_reader_is_of_a_step(reader):
    for key, verdict in (item for row in READERS[reader] for item in row.lacking.items()):
        kind = key.partition(":")[0]
        assert kind in ("dora", "initialised", "no_experts", *CHANGES) or str(Step(kind, ("a", "b", "c")))
        assert verdict in ("fails", "wrong", "unknown")
