"""The stamp: what it says of a file, that whoever writes the file writes it, and that nobody else minds it."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from dataclasses import replace

import peft
import pytest
import torch
import transformers
import transformers.integrations.peft
from packaging.version import Version
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import zoo

import peft_moe_compat
from peft_moe_compat import PeftMoeCompatError
from peft_moe_compat.adapters.stamp import STAMP_KEY, ModuleStamp, Stamp, numbers_of, read_stamp
from peft_moe_compat.errors import AdapterFileError

FAMILY = zoo.FAMILIES[0]
STAMP = Stamp("0.21.2", "5.23.0", "rank_major", {"m.experts": ModuleStamp(4, ("a", "b"), "linear", ((3, 8), (4, 3)))})


def metadata(folder, name="adapter_model.safetensors"):
    with safe_open(folder / name, framework="pt") as file:
        return file.metadata()


def saved(family, folder, **lora):
    """A model with random LoRA on its experts, saved with the library active, and its logits."""
    model = zoo.peft_model(zoo.tiny_model(family), **lora).eval()
    model.save_pretrained(folder)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=zoo.token_ids()).logits


def test_a_stamp_comes_back_as_it_was():
    joined = ModuleStamp(4, ("a",), "linear", ((3, 8),), joined=(2, 3))
    for stamp in (STAMP, Stamp("0.18.1", "4.57.6", "grouped", {"m.experts": joined})):
        assert read_stamp(stamp.to_metadata()) == stamp
    assert read_stamp({"format": "pt"}) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("peft"),
        lambda c: c.update(packing="mixed"),
        lambda c: c.update(modules=[]),
        lambda c: c["modules"]["m.experts"].update(orientation="sideways"),
        lambda c: c["modules"]["m.experts"].update(features=[[3, 8]]),
        lambda c: c["modules"]["m.experts"].update(num_experts="many"),
    ],
)
def test_a_damaged_stamp_is_an_error_not_a_guess(change):
    content = json.loads(STAMP.to_metadata()[STAMP_KEY])
    change(content)
    with pytest.raises(AdapterFileError, match="'peft_moe_compat' is damaged"):
        read_stamp({STAMP_KEY: json.dumps(content)})
    with pytest.raises(AdapterFileError, match="'peft_moe_compat' is damaged"):
        read_stamp({STAMP_KEY: "{"})


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_it_says_how_the_file_is_laid_out(family, tmp_path):
    """Against the wrappers' own numbers: which factor orientation and nesting rebuild PEFT's delta."""
    model = saved(family, tmp_path)
    stamp = read_stamp(metadata(tmp_path))
    assert (stamp.peft, stamp.transformers, stamp.packing) == (peft.__version__, transformers.__version__, "rank_major")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wrappers = {n: m for n, m in model.named_modules() if m in zoo.wrappers(model)}
    assert sum(len(module.nesting) for module in stamp.modules.values()) == len(wrappers) > 0
    for name, wrapper in wrappers.items():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        said = stamp.modules[path]
        depth = name.count(".base_layer")
        assert said.nesting[len(said.nesting) - 1 - depth] == wrapper.parameter_name
        assert said.num_experts == wrapper.num_experts
        fan_in, fan_out = said.features[said.nesting.index(wrapper.parameter_name)]
        A, B = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
        r, E = wrapper.r["default"], said.num_experts
        first = B[:, 0::E] @ A[:r] * wrapper.scaling["default"]  # of expert 0
        update = first if said.orientation == "linear" else first.T
        assert tuple(update.shape) == (fan_out, fan_in)
        delta = wrapper.get_delta_weight("default")[0]
        weight = wrapper.get_param()[0]
        stored_out_in = tuple(weight.shape) == (fan_out, fan_in)  # no stack here is square
        torch.testing.assert_close(delta if stored_out_in else delta.T, update, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_of_a_stamped_file_too(tmp_path):
    saved(FAMILY, tmp_path)
    for wrong in ({"written_by": "me"}, {"nesting": ["nobody"]}, {"nesting": "nobody"}, {"orientation": "up"}):
        with pytest.raises(PeftMoeCompatError, match="me|nobody|up"):
            peft_moe_compat.inspect_adapter(tmp_path, **wrong)


def test_stock_peft_reads_a_stamped_file_and_saves_it_again_without(tmp_path, stock, recwarn):
    model = saved(FAMILY, tmp_path / "stamped")
    base = zoo.tiny_model(FAMILY).eval()
    base.load_state_dict(model.get_base_model().state_dict(), strict=False)
    assert STAMP_KEY in metadata(tmp_path / "stamped")

    def again():
        before = len(recwarn)
        loaded = PeftModel.from_pretrained(zoo.tiny_model(FAMILY), tmp_path / "stamped")
        loaded.save_pretrained(tmp_path / "stock")
        return loaded, [str(w.message) for w in recwarn.list[before:] if "stamp" in str(w.message).lower()]

    loaded, complaints = stock(again)
    assert complaints == []
    assert STAMP_KEY not in metadata(tmp_path / "stock")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stamped", "stock"))
    assert first.keys() == second.keys()
    assert len(first) == 2 * len(zoo.wrappers(model)) > 0
    assert all(torch.equal(first[name], second[name]) for name in first)
    for theirs, ours in zip(zoo.wrappers(loaded), zoo.wrappers(model), strict=True):
        assert torch.equal(theirs.get_delta_weight("default"), ours.get_delta_weight("default"))


def test_but_for_the_stamp_the_files_are_those_of_stock_peft(tmp_path, stock):
    model = saved(FAMILY, tmp_path / "ours")
    stock(model.save_pretrained, tmp_path / "theirs")
    ours, theirs = metadata(tmp_path / "ours"), metadata(tmp_path / "theirs")
    assert ours.pop(STAMP_KEY)
    assert ours == theirs
    for name in ("adapter_config.json", "README.md"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    tensors, expected = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs"))
    assert list(tensors) == list(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_only_the_process_that_saves_stamps(tmp_path):
    model = saved(FAMILY, tmp_path / "main")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "adapter_model.safetensors").exists()
    before = (tmp_path / "main" / "adapter_model.safetensors").stat().st_mtime_ns
    model.save_pretrained(tmp_path / "main", is_main_process=False)
    assert (tmp_path / "main" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_pickled_file_has_no_room_for_it_and_is_saved_all_the_same(tmp_path):
    model = zoo.peft_model(zoo.tiny_model(FAMILY))
    model.save_pretrained(tmp_path, safe_serialization=False)
    state = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    assert not any(STAMP_KEY in name for name in state)


def test_every_adapter_of_a_model_gets_its_own(tmp_path):
    model = zoo.peft_model(zoo.tiny_model(FAMILY))
    model.add_adapter("attention", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert STAMP_KEY in metadata(tmp_path)
    assert STAMP_KEY not in metadata(tmp_path / "attention")  # nothing there to speak of


def test_a_state_dict_of_the_callers_is_described_or_left_alone(tmp_path):
    model = saved(FAMILY, tmp_path / "plain")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "same", state_dict=state)
    assert metadata(tmp_path / "same") == metadata(tmp_path / "plain")
    odd = {n: t[:, :1].contiguous() if "lora_A" in n else t for n, t in state.items()}
    model.save_pretrained(tmp_path / "odd", state_dict=odd)
    assert STAMP_KEY not in metadata(tmp_path / "odd")


def test_experts_of_unknown_orientation_are_not_spoken_of(tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 4, 5))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

    def save(model, folder):
        config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
        peft.get_peft_model(model, config).save_pretrained(folder)
        return metadata(folder)

    assert STAMP_KEY not in save(Model(), tmp_path / "unknown")
    model = Model()
    peft_moe_compat.declare_layout(model.experts, is_transposed=True)
    said = read_stamp(save(model, tmp_path / "declared")).modules["experts"]
    assert said.features == ((4, 5),)


def mixin_model():
    """A transformers model with an adapter of its own, no PeftModel around it."""
    model = zoo.tiny_model(FAMILY)
    needed = transformers.integrations.peft.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(needed):
        pytest.skip(f"transformers {transformers.__version__} adds no adapters of a PEFT before {needed}")
    targets = peft_moe_compat.expert_parameters(model)
    model.add_adapter(LoraConfig(r=2, target_modules=[], target_parameters=targets))
    zoo.randomise(model)
    return model


def test_transformers_own_adapters_are_stamped_too(tmp_path, stock):
    model = mixin_model()
    model.save_pretrained(tmp_path / "ours")
    zoo.peft_model(zoo.tiny_model(FAMILY)).save_pretrained(tmp_path / "peft")
    ours, theirs = (read_stamp(metadata(tmp_path / name)) for name in ("ours", "peft"))
    assert replace(ours, config=None) == replace(theirs, config=None)
    assert ours.config == numbers_of(json.loads((tmp_path / "ours" / "adapter_config.json").read_text()))
    stock(model.save_pretrained, tmp_path / "stock")
    assert STAMP_KEY not in metadata(tmp_path / "stock")


def test_every_shard_speaks_of_what_it_holds(tmp_path):
    model = mixin_model()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(path.name for path in tmp_path.glob("adapter_model-*.safetensors"))
    assert len(shards) > 1
    spoken = set()
    for shard in shards:
        held = {
            n.removeprefix("base_model.model.").split(".lora_")[0].replace(".base_layer", "")
            for n in load_file(tmp_path / shard)
        }
        stamp = read_stamp(metadata(tmp_path, shard))
        said = set() if stamp is None else set(stamp.modules)
        assert said <= held
        spoken |= said
    assert spoken


def test_a_models_own_weights_are_not_stamped(tmp_path):
    model = zoo.tiny_model(FAMILY)
    model.save_pretrained(tmp_path)
    assert metadata(tmp_path, "model.safetensors") == {"format": "pt"}


def test_a_file_of_this_library_is_read_by_its_stamp_whatever_the_config_says(tmp_path, caplog):
    """A lie in the config, as PEFT leaves there when it loads an unstamped file and saves it again."""
    saved(FAMILY, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for version in ("0.18.1", "0.19.0", "0.19.1"):
        path.write_text(json.dumps(config | {"peft_version": version}))
        with caplog.at_level(logging.INFO, "peft_moe_compat"):
            PeftModel.from_pretrained(zoo.tiny_model(FAMILY), tmp_path)
    assert caplog.messages == []


def two_adapters(tmp_path):
    """Models that differ in rank and alpha alone, and a folder in which the first is saved."""
    first, second = (zoo.peft_model(zoo.tiny_model(FAMILY), r=r, lora_alpha=alpha) for r, alpha in ((2, 8), (4, 3)))
    first.save_pretrained(tmp_path)
    return first, second


def test_weights_beside_the_config_of_before_are_noticed(tmp_path, monkeypatch):
    _, second = two_adapters(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(peft.LoraConfig, "save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            second.save_pretrained(tmp_path)
    message = "saved with another adapter_config.json than lies beside them: r 4 and 2; lora_alpha 3 and 8"
    with pytest.raises(AdapterFileError, match=message):
        peft_moe_compat.inspect_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(zoo.tiny_model(FAMILY), tmp_path)
    second.save_pretrained(tmp_path)
    assert peft_moe_compat.inspect_adapter(tmp_path, content=False).modules


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"lora_alpha": 8}, {"lora_alpha": 16}, "lora_alpha 16 and 8"),
        ({}, {"use_rslora": True}, "use_rslora True and None"),
        ({"alpha_pattern": {"q_proj": 3}}, {}, "alpha_pattern None and"),
        ({"use_dora": True}, {}, "use_dora None and True"),
    ],
)
def test_so_they_are_of_lora_beside_the_experts(tmp_path, monkeypatch, first, second, message):
    def model(**lora):
        return peft.get_peft_model(zoo.tiny_model(FAMILY), LoraConfig(r=2, target_modules=["q_proj"], **lora))

    model(**first).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(zoo.tiny_model(FAMILY), tmp_path).peft_config
    with monkeypatch.context() as patch:
        patch.setattr(peft.LoraConfig, "save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**second).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=message):
        peft_moe_compat.inspect_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(zoo.tiny_model(FAMILY), tmp_path)


def test_a_saving_that_is_killed_leaves_the_old_adapter_or_the_new_or_says_so(tmp_path):
    models = two_adapters(tmp_path)
    found = {}
    for attempt in range(40):
        if (child := os.fork()) == 0:
            try:
                while True:
                    for model in models:
                        model.save_pretrained(tmp_path)
            finally:
                os._exit(1)
        time.sleep(0.005 + 0.002 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            rank = peft_moe_compat.inspect_adapter(tmp_path, content=False).modules[0].projections[0].rank
        except AdapterFileError:
            rank = "refused"
        else:
            rows = load_file(tmp_path / "adapter_model.safetensors")
            sizes = {tensor.shape[0] for name, tensor in rows.items() if "experts.lora_A" in name}
            assert sizes == {rank * next(iter(zoo.wrappers(models[0]))).num_experts}
        found[rank] = found.get(rank, 0) + 1
        models[0].save_pretrained(tmp_path)
    assert {2, 4} & found.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_model_name_or_path", "elsewhere"), ("inference_mode", False), ("revision", "main"), ("lora_dropout", 0.1)],
)
def test_what_is_beside_the_numbers_may_be_edited(tmp_path, field, value):
    saved(FAMILY, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    assert peft_moe_compat.inspect_adapter(tmp_path, content=False).modules


def test_a_converted_file_tells_its_numbers_too(tmp_path):
    saved(FAMILY, tmp_path / "in")
    model = zoo.tiny_model(FAMILY).config.to_dict()
    peft_moe_compat.convert_adapter(
        tmp_path / "in", tmp_path / "out", to="peft==0.21.2,transformers==5.24.0", model=model
    )
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 77}))
    with pytest.raises(AdapterFileError, match="lora_alpha"):
        peft_moe_compat.inspect_adapter(tmp_path / "out", model=model)


def test_a_file_of_an_older_stamp_says_nothing_of_its_config(tmp_path):
    saved(FAMILY, tmp_path)
    content = json.loads(metadata(tmp_path)[STAMP_KEY])
    assert content.pop("config")["r"]
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", STAMP_KEY: json.dumps(content)})
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 77}))
    assert peft_moe_compat.inspect_adapter(tmp_path, content=False).modules


def test_lora_of_experts_is_not_laid_side_by_side_with_its_beginning(tmp_path):
    """PEFT concatenates flat factors, which mixes the ranks of one expert with those of another."""
    model = zoo.peft_model(zoo.tiny_model(FAMILY))
    model.save_pretrained(tmp_path / "beginning")
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(PeftMoeCompatError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "beginning"))
