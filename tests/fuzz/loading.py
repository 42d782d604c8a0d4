"""Adapters put into a tiny model by the installed PEFT, with the package active: all of it arrives, or an error."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fuzz.cases import Case
from fuzz.families import FAMILIES, Family
from fuzz.limits import TooSlowError, bounded
from fuzz.oracle import Meaning
from fuzz.takes import ViolationError
from peft_moe_compat.errors import PeftMoeCompatError

ROUND_OFF, ROOM = 1e-5, 1e36  # PEFT adds up in float32, whose sums and products may not reach its largest number
_COMMON = {"vocab_size": 61, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


def tiny_model(case: Case) -> Any:
    """A model of the case's family and sizes, with random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = {**FAMILIES[case.family].config(case.E, case.H, case.I), **_COMMON, "num_experts_per_tok": 2}
    sizes |= {"num_hidden_layers": case.layers, "max_position_embeddings": 64}
    if case.family == "gpt_oss":
        sizes["layer_types"] = ["full_attention"] * case.layers
    config = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def added(model: Any, family: Family, transformers: str) -> Meaning:
    """What PEFT adds: (layer, role) -> updates of gate, up and down, path -> update of a linear."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    transposed, _ = family.held(transformers)
    found = Meaning()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or "default" not in getattr(module, "lora_A", {}):
            continue
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        delta = module.get_delta_weight("default").detach().double()
        if not isinstance(module, ParamWrapper) or delta.ndim == 2:
            found.linears[path] = delta
            continue
        delta = delta.transpose(1, 2) if transposed else delta
        layer = int(path.split(".layers.")[1].split(".")[0])
        rows = family.halves(delta.shape[1]) if module.parameter_name.startswith("gate_up") else {"down": slice(None)}
        found.experts |= {(layer, role): delta[:, which] for role, which in rows.items()}
    return found


def check_loading(
    case: Case, said: Mapping[str, Any], folder: Path, meaning: Meaning | str | None, tally: Counter[str]
) -> None:
    """Loads an adapter.

    Args:
        case: Of a family that `tiny_model` builds.
        said: What the caller knows of the file.
        folder: The adapter's.
        meaning: What it has to mean once loaded; "refuse" where it is not to load, None for whatever comes.
        tally: Counts what came.

    Raises:
        ViolationError: Something else has arrived, or what was raised for a good file is not the package's own.
    """
    import transformers
    from peft import PeftModel

    import peft_moe_compat

    family = FAMILIES[case.family]
    if family.single_experts(transformers.__version__):
        tally["loading: experts are modules"] += 1
        return
    model = tiny_model(case)
    peft_moe_compat.activate()
    try:
        told = {name: said[name] for name in ("orientation", "packing", "nesting") if name in said}
        with warnings.catch_warnings(), bounded(), peft_moe_compat.written_by(**told):
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    except PeftMoeCompatError as error:
        tally[f"loading: {type(error).__name__}"] += 1
        return
    except (TooSlowError, MemoryError) as error:
        raise ViolationError("loading takes too much", type(error).__name__) from None
    except Exception as error:
        if not case.damages:
            raise ViolationError(f"loading raises {type(error).__name__}", str(error)[:300]) from error
        tally["loading: PEFT's own error"] += 1
        return
    tally["loading: loaded"] += 1
    with torch.no_grad():
        found = added(loaded, family, transformers.__version__)
    updates = [*found.experts.values(), *found.linears.values()]
    if meaning == "refuse" and all(bool(update.isfinite().all()) for update in updates):  # PEFT loads a NaN as one
        raise ViolationError("a file that means nothing loads", str(folder))
    if isinstance(meaning, Meaning):
        # What is targeted and not in the file gets a LoRA that adds nothing.
        linears = {path: one for path, one in found.linears.items() if path in meaning.linears or one.any()}
        beyond = {key for key, one in (meaning.experts | meaning.linears).items() if one.abs().max() > ROOM}
        expected, loaded_as = (
            Meaning(*({key: one for key, one in part.items() if key not in beyond} for part in parts))
            for parts in ((meaning.experts, meaning.linears), (found.experts, linears))
        )
        difference = expected.difference(loaded_as, ROUND_OFF)
        if difference:
            raise ViolationError("loading changes what the file means", difference)
