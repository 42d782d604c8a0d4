"""`peft-moe-compat targets` and `init`: what a trainer's own options want to know of a model's experts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..errors import AdapterError
from .failing import with_exit_code

__all__ = ["TRAINERS", "Trainer", "register"]


@dataclass(frozen=True)
class Trainer:
    """How a trainer is told which expert parameters to adapt.

    Attributes:
        text: What to paste; `{python}`, `{json}`, `{words}` and `{model}` stand for the names and the model.
        options: The trainer's own options in it.
        source: The release and file they were read in.
    """

    text: str
    options: tuple[str, ...]
    source: str


# fmt: off
TRAINERS: Mapping[str, Trainer] = {
    "peft": Trainer("""\
# lora_dropout: stock PEFT refuses any on experts; with peft_moe_compat active it is applied
LoraConfig(
    target_modules=[],  # or names of attention layers beside the experts
    target_parameters={python},
)
""", ("target_modules", "target_parameters", "lora_dropout"), "PEFT 0.21.2, tuners/lora/config.py"),
    "trl": Trainer("""\
# trl sft --config THIS.yaml; also dpo, grpo, kto, reward, rloo
use_peft: true
lora_target_modules: []  # or names of attention layers beside the experts
lora_target_parameters: {json}
lora_dropout: 0.0  # TRL's default, 0.05, is refused by stock PEFT on experts; with peft_moe_compat active it is applied
""", ("use_peft", "lora_target_modules", "lora_target_parameters", "lora_dropout"),
        "TRL 1.16.0, trainer/model_config.py"),
    "axolotl": Trainer("""\
adapter: lora
lora_target_modules: []  # or names of attention layers beside the experts
lora_target_parameters: {json}
lora_dropout: 0.0  # beside lora_target_parameters Axolotl itself refuses any other
""", ("adapter", "lora_target_modules", "lora_target_parameters", "lora_dropout"),
        "Axolotl 067b021c8, utils/schemas/peft.py"),
    "ms-swift": Trainer("""\
# to `swift sft` or `swift rlhf`; linear layers beside the experts are --target_modules, by default all-linear
# the default of --lora_dropout, 0.05, is refused by stock PEFT on experts; with peft_moe_compat active it is applied
--tuner_type lora --lora_dropout 0 --target_parameters {words}
""", ("tuner_type", "target_parameters", "lora_dropout", "target_modules"),
        "ms-swift 3602360a5, arguments/tuner_args.py"),
    "llamafactory": Trainer("""\
# LLaMA-Factory has no option for parameters, and goes on from an adapter that has them:
#   peft-moe-compat init {model} FRESH --rank 8
# Rank, alpha, targets and dropout are then the adapter's: lora_rank, lora_alpha, lora_target, lora_dropout do nothing.
finetuning_type: lora
adapter_name_or_path: FRESH
""", ("finetuning_type", "adapter_name_or_path", "lora_rank", "lora_alpha", "lora_target", "lora_dropout"),
        "LLaMA-Factory ff6d4d12e, model/adapter.py, hparams/"),
}
# fmt: on

_Model = Annotated[
    str,
    typer.Argument(help="The base model's config: a folder, a config.json, or a Hub id.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (targets, init, plugin):
        app.command()(with_exit_code(2, command))


def targets(
    model: _Model,
    trainer: Annotated[
        str, typer.Option("--for", help=f"The trainer: {', '.join(TRAINERS)}. By default the names alone.")
    ] = "",
) -> None:
    """Prints the names of a model's routed experts, as a trainer wants them. Reads the config, and no weights.

    Exit code 2 for a model that has none, or cannot be read.
    """
    from ..adapters.base_model import load_base_model
    from ..model.targets import expert_parameters
    from ..proving import model_without_weights

    if trainer and trainer not in TRAINERS:
        raise AdapterError(f"--for is {trainer!r}; one of {', '.join(TRAINERS)} was expected.")
    names = expert_parameters(model_without_weights(load_base_model(model))[1])
    typer.echo(told(trainer, names, model).rstrip())


def told(trainer: str, names: Sequence[str], model: str) -> str:
    """What to paste, of a trainer in `TRAINERS`; of "" the names, one a line."""
    if not trainer:
        return "\n".join(names)
    spelled = {"python": repr(list(names)), "json": json.dumps(list(names)), "words": " ".join(names)}
    return TRAINERS[trainer].text.format(**spelled, model=shlex.quote(model))


def plugin(trainer: Annotated[str, typer.Argument(help="ms-swift.", show_default=False)]) -> None:
    """Prints the path of the file that a trainer imports by its path: ms-swift, as one of its external plugins."""
    if trainer != "ms-swift":
        raise AdapterError(f"{trainer!r} has no file to import; ms-swift was expected.")
    typer.echo(str(Path(__file__).parent.parent / "integrations" / "swift.py"))


def init(
    model: _Model,
    out: Annotated[Path, typer.Argument(help="Folder to be made.", show_default=False)],
    rank: Annotated[int, typer.Option(help="PEFT's r.")],
    alpha: Annotated[float | None, typer.Option(help="PEFT's lora_alpha; by default twice the rank.")] = None,
    target_parameters: Annotated[
        str, typer.Option(help="Expert parameters, with commas; by default all routed experts.")
    ] = "",
    target_modules: Annotated[
        str, typer.Option(help="Linear layers beside them: names with commas, or all-linear; by default none.")
    ] = "",
    dropout: Annotated[
        float, typer.Option(help="PEFT's lora_dropout; on experts it is applied where peft_moe_compat is active.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of lora_A.")] = 0,
) -> None:
    """Writes a fresh adapter on a model's experts, which changes nothing yet, for trainers to go on from.

    lora_A is as PEFT initialises it, lora_B is zero. Reads the config, and no weights. Exit code 2 for input that
    cannot be used.
    """
    from ..fresh import write_fresh_adapter

    written = write_fresh_adapter(
        model,
        out,
        rank=rank,
        alpha=alpha,
        target_parameters=_listed(target_parameters) or None,
        target_modules=target_modules if target_modules == "all-linear" else _listed(target_modules),
        dropout=dropout,
        seed=seed,
    )
    weights = f"{written.layers} weight{'s' * (written.layers != 1)}"
    typer.echo(f"{written.folder}: {written.numbers:,} numbers on {weights} of {written.model}")
    if written.unreached:
        typer.echo(f"warning: nothing in the model is called {', '.join(map(repr, written.unreached))}", err=True)


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
