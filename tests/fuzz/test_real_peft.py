"""What `inspect` says of PEFT, and what `convert` writes for it, against the installed PEFT on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers
from packaging.specifiers import SpecifierSet
from peft import PeftModel
from peft import __version__ as PEFT
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from support import zoo

from fuzz.families import FAMILIES, PAIRS
from fuzz.made import draw, make, save
from fuzz.oracle import Meaning
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter

SIZES = {"qwen3_moe": (6, 32, 24), "mixtral": (6, 32, 24), "gpt_oss": (6, 32, 24)}
HERE = next((i for i, pair in enumerate(PAIRS) if pair[0] == PEFT), len(PAIRS) - 1)


def loaded(folder, family):
    """What PEFT adds to a tiny model: (layer, role) -> updates of gate_up or down, path -> update of a linear."""
    model = PeftModel.from_pretrained(zoo.tiny_model(family.model_type), str(folder))
    transposed, _ = family.held(transformers.__version__)
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


def cases():
    """The first cases of a family that the tiny model fits, and whose LoRA beside the experts it has."""
    for name, (E, H, I) in SIZES.items():
        drawn = (draw(seed, ()) for seed in range(2000))
        alike = [c for c in drawn if c.family == name and c.form in ("fused", "single") and c.prefix == "peft"]
        for case in alike[:5]:
            beside = "".join(letter for letter in case.beside if letter == "R")
            plain = {"dtype": "float32", "missing": 0, "shards": 1, "model": True, "told": True}
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
