"""Who reads adapters, and what form each of them takes.

Source: the readers' own code. vLLM 0.33 `lora/`, SGLang 0.5.23 `srt/lora/`, llama.cpp's `convert_lora_to_gguf.py`;
tests/readers runs all three on what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import AdapterError
from ..releases import NEWEST_TESTED, installed_versions, parse_releases, release_for

__all__ = ["KEEP_THE_BASE", "READERS", "NotTakenError", "Reader", "Target", "parse_target"]

# Values of `init_lora_weights` that leave the base model as it was: vLLM's list without lora_ga, which does not.
KEEP_THE_BASE = {"gaussian", "eva", "orthogonal", "mica"}


class NotTakenError(AdapterError):
    """The reader takes no such adapter in any form. `kind` is that of a step, see `Reader.lacking`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Reader:
    """What is known of a reader.

    Attributes:
        title: What it is called in text.
        form: Of the experts' LoRA: `"fused"`, `"per_expert"`, `"gguf"`: 3-D factors under the names that llama.cpp
            gives its own tensors, or `"shared_outer"`: 3-D factors, of one expert on the side that all share.
        fused: Families that it takes fused all the same, as the newest PEFT writes them.
        refuses: Families whose experts it takes no LoRA on.
        one_lora_A: Families whose gate and up have to share one lora_A.
        complete: Whether every projection of an adapted experts module has to be there.
        scaling: How it scales an update. "config": alpha / r or rsLoRA's, with patterns. "uniform": `lora_alpha / r`
            for all, and every rank is `r`. "alpha": `lora_alpha` over the rank of the tensor at hand.
        everything: Whether it reads all that PEFT can put into an adapter: modules_to_save, DoRA, biases, embeddings.
        linears: Names it has for every family's linears, by role; None where it goes by the family's own. An up
            projection without a gate bears the gate's.
        renames: Other names of linears that it takes for those.
        targets: Where it wants the names of all linears of an adapted experts module, or "all-linear", in
            `target_modules`: what it takes some of them for. None where it does not, or matches them as PEFT does.
        heeds: Fields of the config that make it refuse, of those which say that something else than LoRA is there.
        lacking: What it does with a file on which a step was not taken: its kind, or kind:family, or kind:detail ->
            "fails" or "wrong" (without an error). Of all others nothing is known: it may read the file as it is.
    """

    title: str
    form: str
    fused: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    one_lora_A: frozenset[str] = frozenset()  # noqa: N815
    complete: bool = False
    scaling: str = "config"
    everything: bool = False
    linears: Mapping[str, str] | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] | None = None
    heeds: tuple[str, ...] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)


READERS = {
    "peft": Reader(
        "PEFT",
        "fused",
        everything=True,
        lacking={
            "from_stacked": "fails",
            "from_stacked:targeted": "wrong",  # it wraps what else the targets name, and leaves the stacks out
            "packing": "wrong",
            "rank": "fails",
            "targets": "fails",
            "targets:some": "wrong",
            "shards": "fails",
            "upstream_rslora": "wrong",
            "upstream_patterns": "wrong",
            "upstream_roles": "wrong",
        },
    ),
    "per-expert": Reader("a reader of single experts", "per_expert", everything=True),
    "vllm": Reader(
        "vLLM",
        "per_expert",
        fused=frozenset(
            {"gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "interns1_pro"}
        ),
        complete=True,
        heeds=("bias", "lora_bias", "modules_to_save"),
        lacking={
            "from_fused": "fails",
            "from_fused:moved": "wrong",  # it looks at the modules it has, and finds nothing for them
            "from_per_expert": "fails",
            "from_stacked": "fails",
            "packing": "wrong",
            "path": "wrong",
            "linears": "fails",
            "linears:mixtral": "unknown",  # its mapper renames gate_proj, up_proj and down_proj
            "filled": "fails",
            "experts_filled": "fails",
            "experts_padded": "fails",
            "rank": "wrong",
            "dropped": "fails",
            "heeded": "fails",
            "initialised": "fails",
            "dora": "fails",
            "shards": "fails",
        },
    ),
    "sglang": Reader(
        "SGLang",
        "per_expert",
        refuses=frozenset({"llama4"}),
        one_lora_A=frozenset({"gpt_oss"}),
        complete=True,
        scaling="uniform",
        linears={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
        renames={"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
        targets={"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"},
        lacking={
            "from_fused": "fails",
            "from_stacked:gguf": "wrong",
            "from_stacked:gpt_oss": "wrong",  # gate, then up: it alternates them itself
            "linears": "fails",
            "filled:gate": "fails",
            "filled:gate and down": "fails",
            "targets": "fails",
            "more_targets": "wrong",
            "folded": "wrong",
            "scaling": "wrong",
            "joined": "wrong",
            "rank": "fails",
            "experts_padded": "fails",
            "initialised": "wrong",
            "dora": "fails",
            "no_experts": "fails",
        },
    ),
    "shared-outer": Reader(
        "a server of shared factors",
        "shared_outer",
        refuses=frozenset({"llama4"}),
        one_lora_A=frozenset({"gpt_oss"}),
        complete=True,
        scaling="uniform",
        linears={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    ),
    "llama.cpp": Reader(
        "llama.cpp",
        "gguf",
        scaling="alpha",
        lacking={
            "from_fused": "fails",
            "from_stacked:gate_up": "fails",
            "from_per_expert:gpt_oss": "fails",
            "from_per_expert:llama4": "fails",
            "experts_filled": "fails",
            "experts_padded": "fails",
            "folded": "wrong",
            "scaling": "wrong",
            "dropped": "fails",
            "initialised": "wrong",
            "dora": "fails",
            "shards": "fails",
        },
    ),
}


@dataclass(frozen=True)
class Target:
    """A reader that an adapter is for.

    Attributes:
        name: One of `READERS`.
        peft: For `peft`: the release.
        transformers: For `peft`: the release beside it, None where it does not matter.
    """

    name: str
    peft: str | None = None
    transformers: str | None = None

    @property
    def reader(self) -> Reader:
        return READERS[self.name]

    def __str__(self) -> str:
        if self.name != "peft":
            return self.name
        return f"peft=={self.peft}" + (f",transformers=={self.transformers}" if self.transformers else "")


def parse_target(to: str) -> Target:
    """A reader from its name: `peft` is the installed one, `peft==VERSION[,transformers==VERSION]` another.

    Raises:
        AdapterError: No such reader, or no PEFT is installed.
        UnsupportedPeftError: A PEFT release without expert LoRA.
    """
    if to == "peft":
        found = installed_versions("peft", "transformers")
        if found["peft"] == "not installed":
            raise AdapterError(f"No PEFT is installed to convert for. Name a release: --to peft=={NEWEST_TESTED}.")
        release_for(found["peft"])
        beside = found["transformers"]
        return Target("peft", found["peft"], None if beside == "not installed" else beside)
    if to.startswith("peft=="):
        return Target("peft", *parse_releases(to))
    if to in READERS:
        return Target(to)
    raise AdapterError(
        f"No reader is called {to!r}; one of {', '.join(READERS)}, peft==VERSION or "
        "peft==VERSION,transformers==VERSION was expected."
    )
