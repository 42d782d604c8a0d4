"""What is drawn from an integer: an adapter's form, its sizes, its damages and its readers, in plain values."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch

from fuzz.families import FAMILIES, PAIRS

FUSED = ("fused", "unfolded")
SINGLE = ("single", "single_gate_up", "listed", "outer_single")
STACKED = ("stacked", "stacked_gate_up", "transposed", "native", "shared", "outer", "gguf")
FORMS = (*FUSED, *SINGLE, *STACKED)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SIZES = ((8, 6), (8, 4), (8, 8), (6, 8), (12, 5), (5, 7))
TARGETS = ("peft==0.21.2,transformers==5.23.0", "per-expert", "vllm", "sglang", "llama.cpp", "shared-outer")
VLLM = ("vllm==0.28", "vllm==0.29.1", "vllm==0.30", "vllm==0.32.0", "vllm==0.33")
ALSO = ("", "commands", "loading")  # what else is tried on a file
LIVE = ("qwen3_moe", "mixtral", "gpt_oss")  # families of which there is a tiny model, of E, H, I = 6, 32, 24


@dataclass(frozen=True)
class Case:
    """One adapter and what is done to it, in plain values: what a failure prints, and what shrinking makes simpler.

    Attributes:
        seed: Of the numbers in it, and of what the damages choose.
        only: Fused role that alone is adapted, "" for all.
        pair: (PEFT, transformers) that wrote it, an index of `PAIRS`.
        turned: Whether it is in the orientation that this pair would not write.
        swapped: Whether the wrappers are nested the other way round.
        packing: Of fused factors; `mark` is Unsloth's word for it, and where it stands. "automodel" and "scaled" are
            NeMo's file beside it, without moe_rank_scaling and with it; "experts" the targets of SkyRL and prime-rl.
        patterns: How many patterns of ranks and alphas the config has.
        beside: Letters: attention, router, router as parameter, shared experts, dense layer, head saved whole.
        one_A: Whether gate and up share lora_A.
        way: Of a form that has several: other names, a matrix for a stack of one, experts last.
        missing: Experts without LoRA.
        prefix: How names begin and end: "peft", "bare", "named" (an adapter's name in them), "compiled".
        renamed: Whether the file calls the layers otherwise than the model, and the caller says so.
        told: Whether the caller says all there is to say; else the file alone, with the model or without.
        damages: Names of `damages.DAMAGES`.
        to: The readers to convert for.
        also: One of `ALSO`.
    """

    seed: int = 0
    family: str = "qwen3_moe"
    form: str = "fused"
    E: int = 4
    H: int = 8
    I: int = 6
    r: int = 2
    layers: int = 1
    dtype: str = "float32"
    alpha: float = 4
    rslora: bool = False
    only: str = ""
    pair: int = len(PAIRS) - 1
    turned: bool = False
    swapped: bool = False
    packing: str = "rank_major"
    mark: str = ""
    patterns: int = 0
    beside: str = ""
    one_A: bool = False
    way: int = 0
    missing: int = 0
    prefix: str = "peft"
    shards: int = 1
    renamed: bool = False
    told: bool = True
    model: bool = True
    damages: tuple[str, ...] = ()
    to: tuple[str, ...] = TARGETS
    also: str = ""

    def to_json(self) -> str:
        """What differs from the defaults."""
        there = asdict(self)
        return json.dumps({f.name: there[f.name] for f in fields(self) if there[f.name] != f.default})

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def draw(seed: int, damages: Sequence[str]) -> Case:
    """The case of an integer; `damages` are the names to choose from."""
    rng = random.Random(seed)
    also = rng.choices(ALSO, (96, 3, 1))[0]
    family = FAMILIES[rng.choice(LIVE if also == "loading" else list(FAMILIES))]
    form = "fused" if rng.random() < 0.35 else rng.choice(FORMS)
    if not family.gated and form.endswith("gate_up"):
        form = "stacked"
    if form == "listed" and family.model_type != "gpt_oss":
        form = "single"
    H, I = rng.choice(SIZES)
    flat = form in FUSED
    pairs = [i for i, (_, beside) in enumerate(PAIRS) if not flat or not family.single_experts(beside)]
    pair = rng.choice(pairs)
    grouped = form == "fused" and rng.random() < 0.2
    turned = form == "fused" and rng.random() < 0.2
    mark = rng.choice(("top", "mapping")) if form == "fused" and rng.random() < (0.7 if grouped else 0.1) else ""
    # Of families that are stored in one way alone, and not by the release that NeMo has no name for.
    plain = not (grouped or turned or family.transposed or PAIRS[pair][0] == "0.19.0")
    if form == "native" or (form == "fused" and plain and rng.random() < 0.15):
        mark = rng.choice(("automodel", "scaled"))
    told = rng.random() < 0.6
    counts = rng.choices((0, 1, 2), (40, 45, 15))[0]
    targets = [f"peft=={peft},transformers=={beside}" for peft, beside in PAIRS]
    case = Case(
        seed=seed,
        family=family.model_type,
        form=form,
        # One expert's LoRA is that of a matrix; so it looks where every expert gets all tokens (NeMo's rank scaling).
        E=rng.choice((3, 4, 8) if mark == "scaled" else (2, 3, 4, 4, 8, 11)),
        H=H,
        I=I,
        r=rng.choice((1, 2, 2, 3) if form == "unfolded" else (1, 2, 2, 3, 4)),  # E = r = out can be read in two ways
        layers=rng.choice((1, 1, 2, 3)),
        dtype=rng.choice(("float32", "float32", *DTYPES)),
        alpha=rng.choice((1, 2, 4, 16, 3.5, 0.1)),
        rslora=rng.random() < 0.3 and mark != "scaled",
        only=rng.choice(("", "", "", *family.roles)) if form != "gguf" else "",
        pair=pair,
        turned=turned,
        swapped=flat and rng.random() < 0.2,
        packing="grouped" if grouped else "rank_major",
        mark=mark,
        patterns=0 if form == "native" or mark == "scaled" else rng.choice((0, 0, 0, 1, 2, 4)),
        beside="".join(letter for letter in "arRsdh" if rng.random() < (0.1 if letter == "h" else 0.25)),
        one_A=rng.random() < 0.3,
        way=rng.choice((0, 1)),
        missing=rng.choice((0, 0, 0, 1, 2)),
        prefix=rng.choice(("peft", "peft", "peft", "bare", "named", "compiled")),
        shards=rng.choice((1, 1, 1, 2)),
        renamed=form != "gguf" and rng.random() < 0.1,
        told=told,
        model=told or rng.random() < 0.7 or mark == "scaled",
        damages=tuple(rng.choice(damages) for _ in range(counts)) if damages else (),
        to=tuple(rng.sample([*TARGETS[1:], *targets, rng.choice(VLLM)], 2)),
        also=also,
    )
    named = all(family.place(role, PAIRS[pair][1])[1] == f"{role}_proj" for role in family.roles)
    if form == "fused" and not mark and not grouped and named and rng.random() < 0.1:
        case = replace(case, mark="experts", turned=False, beside=case.beside.replace("R", ""))
    if also == "loading":
        live = {"E": 6, "H": 32, "I": 24, "layers": 2, "beside": "R" if "R" in case.beside else "", "renamed": False}
        return replace(case, **live, prefix="peft", shards=1)
    return case
