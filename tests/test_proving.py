"""What is written for the installed PEFT is tried on the base model before it appears."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
import transformers
from peft import __version__ as installed
from safetensors.torch import save_file
from support import zoo
from support.adapter_files import Spec, read_config, save_fused
from support.limits import seconds

from peft_moe_compat import AdapterError, convert_adapter, proving, releases
from peft_moe_compat.adapters.base_model import load_base_model
from peft_moe_compat.adapters.proof import Proof
from peft_moe_compat.adapters.reader_target import parse_target

THE_PAIR = f"peft=={installed},transformers=={transformers.__version__}"


def saved(family, folder):
    model = zoo.tiny_model(family)
    zoo.peft_model(model).save_pretrained(folder)
    return model.config.to_dict()


@pytest.mark.parametrize("to", ["peft", THE_PAIR])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_installed_pair_is_asked(tmp_path, family, to):
    config = saved(family, tmp_path / "in")
    done = convert_adapter(tmp_path / "in", tmp_path / "out", to=to, model=config)
    assert done.proof.by == done.to_dict()["proven_by"] == "model"
    assert f"PEFT {installed} takes every tensor, in a model of" in str(done.proof)
    assert "ForCausalLM" in str(done.proof)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_other_readers_and_hand_made_configs_are_judged_by_rules(tmp_path, family):
    config = saved(family, tmp_path / "in")
    another = "peft==0.19.1,transformers==5.6.0"
    by_hand = {name: value for name, value in config.items() if name not in ("architectures", "transformers_version")}
    for index, (to, model) in enumerate([("per-expert", config), (another, config), ("peft", by_hand)]):
        done = convert_adapter(tmp_path / "in", tmp_path / str(index), to=to, model=model)
        assert done.proof.by == "rules"


@pytest.mark.parametrize("broken", sorted(proving._BROKEN))
def test_a_pair_that_loads_no_adapter_proves_nothing(tmp_path, broken, monkeypatch):
    config = saved(zoo.FAMILIES[0], tmp_path / "in")
    issue = next(issue for issue in releases.KNOWN_ISSUES if issue.code == broken)
    monkeypatch.setattr(proving, "known_issues", lambda *_: [issue])
    done = convert_adapter(tmp_path / "in", tmp_path / "out", to=THE_PAIR, model=config)
    assert done.proof.by == "none"
    assert str(done.proof) == f"not known whether it is read: here {issue.symptom}; {issue.remedy}"


def test_a_folder_that_peft_would_not_take_never_appears(tmp_path):
    family = zoo.FAMILIES[0]
    saved(family, tmp_path / "in")
    smaller = zoo.tiny_model(family, num_hidden_layers=1, **_LAYERS.get(family, {})).config.to_dict()
    with pytest.raises(AdapterError, match=r"would not take .* of .* tensors would be lost, such as 'model\.layers\.1"):
        convert_adapter(tmp_path / "in", tmp_path / "out", to=THE_PAIR, model=smaller)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


_LAYERS = {"gpt_oss": {"layer_types": ["full_attention"]}}


def test_a_tensor_that_does_not_fit_is_named(tmp_path, monkeypatch):
    family = zoo.FAMILIES[0]
    config = saved(family, tmp_path / "in")
    out = convert_adapter(tmp_path / "in", tmp_path / "out", to=THE_PAIR, model=config).out
    stem = "base_model.model.model.layers.0.mlp.experts"
    wrong = {f"{stem}.lora_{x}.weight": torch.zeros(6 * 3, 24) if x == "A" else torch.zeros(32, 6 * 4) for x in "AB"}
    save_file(wrong, out / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"experts\.lora_\w.weight' is \(\d+, \d+\), and \(\d+, \d+\) is needed"):
        proving.prove(out, parse_target(THE_PAIR), load_base_model(config))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("megatron_config", {"params_dtype": "float32"}, "says nothing of a trained adapter: take it out"),
        ("layers_pattern", "layers", "is what it stumbles over. If the adapter was trained without it, take it out"),
    ],
)
def test_the_field_that_stands_in_the_way_is_named(tmp_path, field, value, said):
    """Megatron's layers are not made without Megatron; the base model has nothing to do with it."""
    base = saved(zoo.FAMILIES[0], tmp_path / "in")
    config = tmp_path / "in" / "adapter_config.json"
    config.write_text(json.dumps({**read_config(tmp_path / "in"), field: value, "inference_mode": False}))
    with pytest.raises(AdapterError, match=rf"thrown away: .*\. {field} {re.escape(said)}") as raised:
        convert_adapter(tmp_path / "in", tmp_path / "out", to=THE_PAIR, model=base)
    assert "base model?" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_refusal_leaves_nothing(tmp_path):
    def refuse(folder, target, base):
        assert read_config(folder)["peft_type"] == "LORA"
        raise AdapterError("no")

    config = saved(zoo.FAMILIES[0], tmp_path / "in")
    with pytest.raises(AdapterError, match="^no$"):
        convert_adapter(tmp_path / "in", tmp_path / "out", model=config, prove=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    proof = Proof("model", ("a", "b"))
    assert convert_adapter(tmp_path / "in", tmp_path / "out", model=config, prove=lambda *_: proof).proof is proof


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "nobodys"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 90_000, "layer_types": None},
        {"num_labels": 10**8},
        {"hidden_act": "nobodys"},
        {"layer_types": ["nobodys"]},
        {"architectures": [3, "Nobodys", "Tensor", None]},
    ],
    ids=str,
)
def test_configs_that_no_model_can_be_built_from(tmp_path, said):
    """In bounded time; the rules are asked instead, or the class that the rest of the config is for.

    Some releases of transformers take a name of no activation, kinds of layers that there are not, and one of no class.
    """
    family = zoo.FAMILIES[0]
    config = saved(family, tmp_path / "in") | said
    start = time.process_time()
    done = convert_adapter(tmp_path / "in", tmp_path / "out", to=THE_PAIR, model=config)
    assert time.process_time() - start < seconds(10)
    assert done.proof.by == "rules" or not said.keys().isdisjoint({"architectures", "hidden_act", "layer_types"})


def test_many_experts_and_layers_take_seconds(tmp_path):
    """As many as Qwen3-30B-A3B has: on the meta device sizes cost nothing, modules do."""
    sizes = {"num_hidden_layers": 48, "hidden_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", **sizes, num_experts=128, num_attention_heads=2, num_key_value_heads=2, vocab_size=61
    )
    spec = Spec(E=128, H=16, I=8, layers=tuple(range(48)))
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")))
    start = time.process_time()
    how = {"to": THE_PAIR, "packing": "rank_major"}
    done = convert_adapter(source, tmp_path / "out", model=config.to_dict(), **how)
    assert done.proof.by == "model"
    assert time.process_time() - start < 120


def test_a_renamed_adapter_is_not_tried_on_the_model_of_the_old_paths(tmp_path):
    """Its own config names that; the one with the new paths is what `--model` is for."""
    base = zoo.tiny_model(zoo.FAMILIES[0])
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(tmp_path / "base")
    model = zoo.peft_model(base)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "in")
    rename = ["model.layers=model.language_model.layers"]
    done = convert_adapter(tmp_path / "in", tmp_path / "out", rename=rename)
    assert done.proof.by != "model"
    with pytest.raises(AdapterError, match="would not take .*--rename model.language_model.layers=model.layers"):
        convert_adapter(tmp_path / "in", tmp_path / "no", rename=rename, model=tmp_path / "base")


def test_where_the_transformers_release_decides_it_is_named(tmp_path):
    spec = Spec()
    source = save_fused(tmp_path / "in", spec, spec.factors(("gate_up", "down")))
    how = {"model": spec.model(), "packing": "rank_major", "orientation": "linear"}
    done = convert_adapter(source, tmp_path / "out", to="peft==0.18.1", **how)
    assert "--to peft==0.18.1,transformers==4.57.6" in str(done.proof)
