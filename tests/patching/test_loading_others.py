"""Files of other writers: each comes out as its writer means it, or is refused before the model has any LoRA.

The oracle is what `fixtures/handmade.py` and `forms.py` recorded of each writer's rules (`truth.safetensors`).
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.written_files import FIXTURES, attempt, base_of, base_weights, matrices, stored_transposed

from peft_moe_compat.errors import AdapterError, AmbiguousAdapterError, LayoutError
from peft_moe_compat.patching.opening import written_by

HANDMADE = FIXTURES.parent / "handmade"
CASES = sorted(path.parent.name for path in HANDMADE.glob("*/truth.json"))


class Case:
    def __init__(self, name):
        self.folder = HANDMADE / name
        self.truth = json.loads((self.folder / "truth.json").read_text())
        self.made_from = FIXTURES.parent / self.truth["made_from"]
        self.base = base_of(self.made_from)
        self.same_base = base_weights.describe(self.base) == self.truth["base_checksum"]
        self.transposed = stored_transposed(self.base, self.made_from)

    def load(self):
        """(model, error)"""
        self.base = base_of(self.made_from)
        return attempt(PeftModel.from_pretrained, self.base, str(self.folder))

    def assert_right(self, model):
        recorded = load_file(self.folder / "truth.safetensors")
        if self.same_base and "logits" in recorded:
            with torch.no_grad():
                logits = model(input_ids=base_weights.TOKEN_IDS, use_cache=False).logits
            torch.testing.assert_close(logits, recorded["logits"], rtol=1e-3, atol=1e-3)
        before = base_of(self.made_from).state_dict()
        after = model.merge_and_unload().state_dict()
        changes = matrices({n: after[n] - before[n] for n in before}, self.truth["model_type"], self.transposed)
        updates = matrices(recorded, self.truth["model_type"], transposed=False)
        assert changes.keys() >= updates.keys()
        for key, change in changes.items():
            update = updates.get(key, torch.zeros_like(change))
            torch.testing.assert_close(change, update, rtol=1e-4, atol=1e-5, msg=str(key))


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_another_writer_comes_out_right_or_is_refused_before_the_model_is_touched(name, stock):
    case = Case(name)
    misleads = name == "few_steps_grouped"  # what it says of itself is wrong, and its numbers do not tell
    with written_by(packing=case.truth["packing"] if misleads else None):
        model, error = case.load()
    if isinstance(error, AmbiguousAdapterError):
        assert "peft_moe_compat.written_by(" in str(error)
        assert not any(hasattr(module, "lora_A") for module in case.base.modules())
        with written_by(**{key: case.truth[key] for key in ("orientation", "packing", "nesting")}):
            model, error = case.load()
    if error is None:
        case.assert_right(model)
        return
    assert isinstance(error, AdapterError | LayoutError), error
    assert "peft-moe-compat convert " in str(error) or "--model" in str(error), error
    assert not any(hasattr(module, "lora_A") for module in case.base.modules())
    theirs, refusal = stock(case.load)
    if refusal is None:  # what is right without the library is not refused
        with pytest.raises((AssertionError, KeyError, RuntimeError, ValueError)):
            stock(case.assert_right, theirs)
