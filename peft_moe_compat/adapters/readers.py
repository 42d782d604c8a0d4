"""Who reads adapters, and what form each of them takes.

Source: the readers' own code. vLLM 0.33 `lora/`, SGLang 0.5.23 `srt/lora/`, llama.cpp's `convert_lora_to_gguf.py`;
tests/readers runs all three on what is written here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import AdapterError
from ..families import family
from ..releases import NEWEST_TESTED, installed_versions, parse_releases, release_for

__all__ = ["KEEP_THE_BASE", "READERS", "Target", "parse_target"]

READERS = ("peft", "per-expert", "vllm", "sglang", "llama.cpp")

# Values of `init_lora_weights` that leave the base model as it was: vLLM's list without lora_ga, which does not.
KEEP_THE_BASE = {"gaussian", "eva", "orthogonal", "mica"}


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: One of `READERS`.
        peft: For `peft`: the release.
        transformers: For `peft`: the release beside it, None where it does not matter.
    """

    name: str
    peft: str | None = None
    transformers: str | None = None

    @property
    def scaling(self) -> str:
        """How it scales an update.

        "config": alpha / r or rsLoRA's, with patterns. "uniform": `lora_alpha / r` for all, and every rank is `r`.
        "alpha": `lora_alpha` over the rank of the tensor at hand.
        """
        return {"sglang": "uniform", "llama.cpp": "alpha"}.get(self.name, "config")

    @property
    def takes_all_peft(self) -> bool:
        """Whether it reads all that PEFT can put into an adapter: modules_to_save, DoRA, biases, embeddings."""
        return self.name in ("peft", "per-expert")

    @property
    def complete(self) -> bool:
        """Whether every projection of an adapted experts module has to be there."""
        return self.name in ("vllm", "sglang")

    def form(self, model_type: str) -> str:
        """`"fused"`, `"per_expert"`, or `"gguf"`: 3-D factors under the names llama.cpp gives its own tensors."""
        if self.name == "peft" or (self.name == "vllm" and family(model_type).vllm_fused):
            return "fused"
        return "gguf" if self.name == "llama.cpp" else "per_expert"

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
