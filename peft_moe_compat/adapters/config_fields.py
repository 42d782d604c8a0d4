"""Every field of PEFT's LoraConfig: whether it changes what the factors in a file mean, and who takes account of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UnsupportedPeftError
from ..releases import newer_than_tested

__all__ = ["CHANGES", "READ", "SAYS_NOTHING", "unread"]

# Field -> what its adapter is: another function of the same factors, or of a base that PEFT changes again on loading.
# Source: `LoraLayer.lora_variants` and the variants' forward, PEFT 0.17 to 0.21.2; `replicate_layers`.
CHANGES: Mapping[str, str] = {
    "alora_invocation_tokens": "aLoRA, which acts on the tokens from its invocation on alone",
    "arrow_config": "Arrow, which routes between adapters token by token",
    "kasa_config": "KaSA, which cuts singular values off the base",
    "layer_replication": "for a model whose layers PEFT has repeated",
    "monteclora_config": "MonteCLoRA, which mixes sampled factors",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA, which pools its input",
}
# What this package reads, or finds in the tensors, wherever it matters.
READ = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "target_modules", "target_parameters",
    "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
# What is about training, beginnings, or where things are loaded; `init_lora_weights` says whether the base changed.
SAYS_NOTHING = frozenset({
    "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
})  # fmt: skip


def unread(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what its adapter is) of everything in a config by which the factors mean what nothing here computes.

    Of a PEFT that is newer than any known that is every field of its own which is switched on.
    """
    yield from ((name, what) for name, what in CHANGES.items() if config.get(name))
    try:
        newer = newer_than_tested(str(config.get("peft_version") or 0), None)
    except UnsupportedPeftError:
        newer = {}
    for name in sorted(config.keys() - CHANGES.keys() - READ - SAYS_NOTHING) if newer else ():
        if config[name] is True or (isinstance(config[name], list | dict) and config[name]):
            yield name, f"by a field that PEFT {newer['peft']} does not know"
