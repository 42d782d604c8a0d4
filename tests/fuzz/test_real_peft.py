"""What `inspect` says of PEFT, and what `convert` writes for it, against the installed PEFT on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers
from packaging.specifiers import SpecifierSet
from peft import PeftModel
from peft import __version__ as PEFT
from support import zoo

from fuzz.cases import draw
from fuzz.families import FAMILIES, PAIRS
from fuzz.loading import added
from fuzz.made import make, save
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter

SIZES = {"qwen3_moe": (6, 32, 24), "mixtral": (6, 32, 24), "gpt_oss": (6, 32, 24)}
HERE = next((i for i, pair in enumerate(PAIRS) if pair[0] == PEFT), len(PAIRS) - 1)


def loaded(folder, family):
    """What PEFT adds to a tiny model."""
    model = PeftModel.from_pretrained(zoo.tiny_model(family.model_type), str(folder))
    return added(model, family, transformers.__version__)


def cases():
    """The first cases of a family that the tiny model fits, and whose LoRA beside the experts it has."""
    for name, (E, H, I) in SIZES.items():
        drawn = (draw(seed, ()) for seed in range(2000))
        alike = [c for c in drawn if c.family == name and c.form in ("fused", "single") and c.prefix == "peft"]
        for case in alike[:5]:
            beside = "".join(letter for letter in case.beside if letter == "R")
            plain = {"dtype": "float32", "missing": 0, "shards": 1, "model": True, "told": True, "renamed": False}
            yield replace(case, E=E, H=H, I=I, layers=2, beside=beside, pair=HERE, **plain)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case.family}-{case.seed}")
def test_peft_loads_what_convert_writes_and_what_inspect_says_it_reads(case, tmp_path, stock):
    if case.family not in zoo.FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no fused {case.family}")
    family, adapter = FAMILIES[case.family], make(case)
    save(adapter, tmp_path / "in")
    verdicts = inspect_adapter(tmp_path / "in", **adapter.said).readers
    ranges = {name: SpecifierSet(name.removeprefix("PEFT ")) for name in verdicts if name.startswith("PEFT ")}
    (here,) = (name for name, releases in ranges.items() if PEFT in releases)
    if verdicts[here].verdict == "reads":
        found = stock(loaded, tmp_path / "in", family)
        assert adapter.meaning.difference(found, 1e-5) is None
    done = convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", **adapter.said)
    found = stock(loaded, done.out, family)
    assert adapter.meaning.difference(found, 1e-5) is None
