"""Loading what every release wrote: read as what it is, or refused where the file cannot tell.

The oracle is the truth each writing release recorded beside its file (`fixtures/write.py`), and PEFT's own deltas.
"""

from __future__ import annotations

import logging
import re

import peft
import pytest
import transformers
from packaging.version import Version
from peft import PeftModel
from support import zoo
from support.processes import result_of
from support.written_files import (
    FUSED,
    TRUTHS,
    assert_true_logits,
    assert_true_updates,
    attempt,
    base_of,
    base_weights,
    name_of,
    saying,
    stored_transposed,
    told,
    turns_round,
)

import peft_moe_compat
from peft_moe_compat.errors import AdapterError, AmbiguousAdapterError
from peft_moe_compat.patching.opening import written_by


@pytest.mark.parametrize("folder", FUSED, ids=name_of)
def test_a_file_of_any_release_is_read_as_what_it_is(folder, caplog):
    """Right, or refused; refused only where nothing in the file can tell, and then right once somebody says it."""
    truth, base = TRUTHS[folder], base_of(folder)
    same_base = base_weights.describe(base) == truth["base_checksum"]
    transposed = stored_transposed(base, folder)
    caplog.set_level(logging.INFO, "peft_moe_compat")
    model, error = attempt(PeftModel.from_pretrained, base, folder)
    if not truth["parameters"].keys() <= dict(base.named_parameters()).keys() and error is not None:
        assert isinstance(error, AdapterError), error
        assert re.search(r"another transformers release built it.*peft-moe-compat convert", str(error))
        assert not zoo.wrappers(base)
        return
    if error is not None:
        assert isinstance(error, AmbiguousAdapterError), error
        assert turns_round(base, truth), error
        assert "peft_moe_compat.written_by(" in str(error)
        assert not zoo.wrappers(base), "a refusal must leave the model as it was"
        with written_by(**saying(truth)):
            model = PeftModel.from_pretrained(base, folder)
    assert len(told(caplog)) <= 1
    assert_true_updates(model, folder, transposed)
    if same_base:
        assert_true_logits(model, folder)


@pytest.mark.parametrize("folder", [f for f, t in TRUTHS.items() if t["kind"] == "per_expert"], ids=name_of)
def test_a_per_expert_file_comes_out_right_or_not_at_all(folder, stock):
    """Upstream drops some of them, scales others wrongly, and takes none before PEFT 0.19: refused is no other."""

    def base():
        made = base_of(folder)
        if any(p.ndim == 3 and "experts" in n for n, p in made.named_parameters()):
            return base_weights.fill(made, base_weights.per_expert_values(TRUTHS[folder]["model_type"]))
        return made

    assert TRUTHS[folder]["forward"] == "ok"  # there are logits to compare with
    model, error = attempt(PeftModel.from_pretrained, base(), folder)
    if error is None:
        assert_true_logits(model, folder)
        return
    assert zoo.FUSED, error  # experts one by one are loaded in every release
    assert isinstance(error, peft_moe_compat.LayoutError), error
    assert re.search(r"peft-moe-compat convert .* --to peft", str(error))
    theirs, refusal = stock(attempt, PeftModel.from_pretrained, base(), folder)
    if refusal is None:
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            stock(assert_true_logits, theirs, folder)


TRANSFORMERS_SCRIPT = """
import json, sys
import pytest, peft_moe_compat
from support import written_files as t
from peft_moe_compat.errors import AdapterError, AmbiguousAdapterError, LayoutError
from peft_moe_compat.patching.opening import written_by

def load_and_compare(base, folder, transposed):
    base.load_adapter(str(folder))
    t.assert_true_updates(base, folder, transposed)

def outcome(folder):
    base, truth = t.base_of(folder), t.TRUTHS[folder]
    transposed = t.stored_transposed(base, folder)
    _, error = t.attempt(base.load_adapter, str(folder))
    if isinstance(error, AmbiguousAdapterError) and t.turns_round(base, truth):
        with written_by(**t.saying(truth)):
            _, error = t.attempt(base.load_adapter, str(folder))
    if error is None:
        t.assert_true_updates(base, folder, transposed)
        return "right"
    if isinstance(error, LayoutError) and "model.load_adapter" in str(error):
        peft_moe_compat.deactivate()
        _, upstream = t.attempt(load_and_compare, t.base_of(folder), folder, transposed)
        peft_moe_compat.activate()
        assert upstream is not None, (folder, "comes out right without the library", error)
        return f"upstream: {error}"
    if isinstance(error, AdapterError) and not truth["parameters"].keys() <= dict(base.named_parameters()).keys():
        return "other names"
    peft_moe_compat.deactivate()
    for source in (folder, *t.written_here(folder)[:1]):  # the same file, and one of this very release
        _, upstream = t.attempt(t.base_of(source).load_adapter, str(source))
        if type(upstream) is type(error):
            break
    peft_moe_compat.activate()
    assert type(upstream) is type(error), (folder, error)
    return f"upstream: {type(upstream).__name__}: {upstream}"

found = {}
for folder in t.FUSED:
    try:
        found[t.name_of(folder)] = outcome(folder)
    except pytest.skip.Exception as reason:
        found[t.name_of(folder)] = f"no model: {reason}"
print("RESULT" + json.dumps(found))
"""


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.5") and Version(peft.__version__) < Version("0.19"),
    reason="transformers 5.5 loads by peft.utils.transformers_weight_conversion, which PEFT 0.19 brought",
)
def test_transformers_own_loader_reads_them_too():
    """In a process of its own: transformers 5.0 to 5.12 rewrite PEFT when this is called."""
    found = result_of(TRANSFORMERS_SCRIPT)
    assert found.keys() == {name_of(folder) for folder in FUSED}
    assert sum(outcome == "right" for outcome in found.values()) > len(FUSED) // 4, set(found.values())
