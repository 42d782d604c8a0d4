"""Loading: files of another convention converted, wrong-but-fitting ones refused, right ones left alone."""

from __future__ import annotations

import json
import logging
import warnings

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import zoo
from support.saved_adapters import (
    FAMILY,
    HERE,
    SQUARE,
    E,
    assert_equal,
    change_file,
    flipped,
    rewrite,
    save,
    written_otherwise,
)
from support.written_files import told

import peft_moe_compat
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.orientations import orientations
from peft_moe_compat.errors import (
    AdapterError,
    AdapterFileError,
    AmbiguousAdapterError,
    LayoutError,
)
from peft_moe_compat.patching.opening import written_by
from peft_moe_compat.patching.replacement import Replacement, below
from peft_moe_compat.patching.replacements import replacements


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_flipped_file_is_converted_with_one_line_and_gives_the_same_bits(family, tmp_path, caplog):
    expected, fresh = save(tmp_path, family)
    rewrite(tmp_path, flipped, peft_version=written_otherwise(family))
    caplog.set_level(logging.INFO, "peft_moe_compat")
    model = PeftModel.from_pretrained(fresh(), tmp_path)
    assert_equal(model, expected)
    (line,) = told(caplog)
    assert line.startswith(f"{tmp_path}: the expert LoRA of ")
    assert f"was converted in memory for PEFT {peft.__version__}, since it is " in line
    ids = zoo.token_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_file_that_is_right_goes_through_as_without_the_library(family, tmp_path, caplog, stock):
    """The same bits, the same warnings, the same config in memory, and nothing is logged."""
    _, fresh = save(tmp_path, family)
    rewrite(tmp_path)  # no stamp
    caplog.set_level(logging.INFO, "peft_moe_compat")

    def load():
        with warnings.catch_warnings(record=True) as caught, written_by(HERE):
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(fresh(), tmp_path)
        return model, [(w.category, str(w.message)) for w in caught]

    (model, ours), (expected, theirs) = load(), stock(load)
    assert ours == theirs
    assert_equal(model, expected)
    assert model.peft_config["default"].to_dict() == expected.peft_config["default"].to_dict()
    assert told(caplog) == []


def test_a_square_file_is_read_by_the_version_that_wrote_it(tmp_path):
    other, same = written_otherwise(), peft.__version__
    expected, fresh = save(tmp_path / "same", sizes=SQUARE, target_parameters=["experts.down_proj"])
    rewrite(tmp_path / "same", peft_version=same)
    save(tmp_path / "other", sizes=SQUARE, target_parameters=["experts.down_proj"])
    rewrite(tmp_path / "other", flipped, peft_version=other)
    release = f"transformers=={transformers.__version__}"  # what FAMILY's layout depends on beside PEFT, in some
    for folder, version in ((tmp_path / "same", same), (tmp_path / "other", other)):
        with written_by(f"peft=={version},{release}"):
            model = PeftModel.from_pretrained(fresh(), folder)
        assert_equal(model, expected)


def test_a_square_file_of_nobody_is_refused_and_the_model_left_alone(tmp_path):
    other = written_otherwise()
    expected, fresh = save(tmp_path, sizes=SQUARE, target_parameters=["experts.down_proj"])
    rewrite(tmp_path, flipped, peft_version=None, corda_config=None, trainable_token_indices=None, auto_mapping=None)
    base = fresh()
    with pytest.raises(AmbiguousAdapterError) as caught:
        PeftModel.from_pretrained(base, tmp_path)
    text = str(caught.value)
    assert "orientation is not settled" in text
    assert 'with peft_moe_compat.written_by("peft==VERSION", packing="rank_major"):' in text
    assert f"peft-moe-compat convert {tmp_path} OUT --to peft --written-by peft==" in text
    assert not zoo.wrappers(base)
    (orientation,) = orientations(other, transformers.__version__, FAMILY)
    for said in ({"release": f"peft=={other},transformers=={transformers.__version__}"}, {"orientation": orientation}):
        with written_by(**said, packing="rank_major"):
            assert_equal(PeftModel.from_pretrained(fresh(), tmp_path), expected)


def test_what_is_said_ends_with_its_block_and_must_make_sense(tmp_path):
    _, fresh = save(tmp_path, sizes=SQUARE, target_parameters=["experts.down_proj"])
    rewrite(tmp_path, peft_version=None, corda_config=None, trainable_token_indices=None)
    with written_by(HERE, packing="rank_major"):
        PeftModel.from_pretrained(fresh(), tmp_path)
    with pytest.raises(AmbiguousAdapterError):
        PeftModel.from_pretrained(fresh(), tmp_path)
    for said in ({"release": "peft 0.18"}, {"release": "peft==0.16.0"}, {"packing": "mixed"}, {"orientation": "both"}):
        with pytest.raises(peft_moe_compat.PeftMoeCompatError), written_by(**said):
            pass


def test_a_file_grouped_by_unsloth_is_put_in_pefts_order(tmp_path, caplog):
    expected, fresh = save(tmp_path)

    def grouped(A, B, E):
        r = A.shape[0] // E
        return A, torch.stack([B[:, j * E + e] for e in range(E) for j in range(r)], dim=1)

    rewrite(tmp_path, grouped, auto_mapping={"unsloth_fixed": True})
    caplog.set_level(logging.INFO, "peft_moe_compat")
    assert_equal(PeftModel.from_pretrained(fresh(), tmp_path), expected)
    (line,) = told(caplog)
    assert "lora_B is grouped by expert (auto_mapping has 'unsloth_fixed'" in line


def test_a_converted_adapter_is_from_then_on_of_the_installed_release(tmp_path):
    _, fresh = save(tmp_path / "first")
    rewrite(tmp_path / "first", flipped, peft_version=written_otherwise())
    model = PeftModel.from_pretrained(fresh(), tmp_path / "first")
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config.get("peft_version", peft.__version__) == peft.__version__
    assert_equal(PeftModel.from_pretrained(fresh(), tmp_path / "again"), model)


def test_a_trainer_resumes_into_the_adapter_that_is_there(tmp_path, caplog):
    """`load_adapter` with the name of an adapter that exists, as transformers' Trainer calls it."""
    expected, fresh = save(tmp_path)
    rewrite(tmp_path, flipped)
    model = zoo.peft_model(fresh())
    caplog.set_level(logging.INFO, "peft_moe_compat")
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert_equal(model, expected)
    assert len(told(caplog)) == 1


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="PEFT before 0.20 takes one adapter on parameters"
)
def test_an_adapter_is_loaded_where_the_only_one_was_deleted(tmp_path):
    expected, fresh = save(tmp_path)
    model = PeftModel.from_pretrained(fresh(), tmp_path)
    model.delete_adapter("default")
    rewrite(tmp_path, flipped)
    model.load_adapter(str(tmp_path), "default")
    assert_equal(model, expected)


def test_a_second_adapter_is_read_as_what_it_is(tmp_path):
    expected, fresh = save(tmp_path)

    model = PeftModel.from_pretrained(fresh(), tmp_path)
    rewrite(tmp_path, flipped)
    if Version(peft.__version__) < Version("0.20"):  # refused by PEFT; 0.17.0 makes it for one parameter per module
        with pytest.raises(ValueError, match="target_parameters"):
            model.load_adapter(tmp_path, "second")
        return
    model.load_adapter(tmp_path, "second")
    assert_equal(model, expected, "second")


def test_a_hot_swapped_adapter_is_read_as_what_it_is(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    expected, fresh = save(tmp_path)
    model = zoo.peft_model(fresh())
    rewrite(tmp_path, flipped)
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert_equal(model, expected)


OTHER_RANKS = {
    "lower": {"r": 2},
    "higher": {"r": 5, "lora_alpha": 7},
    "patterns": {"r": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 64}},
    "rslora": {"r": 5, "use_rslora": True},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("lora", OTHER_RANKS.values(), ids=OTHER_RANKS.keys())
def test_an_adapter_of_another_rank_is_swapped_in(tmp_path, lora, compiled):
    """PEFT keeps the rank of before, and copies a lower one over the rows of other experts (0.21)."""
    from peft.utils.hotswap import hotswap_adapter

    expected, fresh = save(tmp_path / "in", **lora)
    same = {name: value for name, value in lora.items() if name in ("alpha_pattern", "use_rslora")}  # PEFT insists
    model = zoo.peft_model(fresh(), **same)
    if compiled:
        compile_experts(model)
    rewrite(tmp_path / "in", flipped)
    hotswap_adapter(model, str(tmp_path / "in"), adapter_name="default", torch_device="cpu")
    model.save_pretrained(tmp_path / "out")
    ids = zoo.token_ids()
    for found in (model, PeftModel.from_pretrained(fresh(), tmp_path / "out")):
        zoo.assert_same({"": found(input_ids=ids).logits}, {"": expected(input_ids=ids).logits}, 1e-5)


def test_hot_swapping_by_a_name_imported_before_is_refused(tmp_path):
    model, fresh = save(tmp_path / "experts")
    zoo.peft_model(fresh(), target_modules=["q_proj"], target_parameters=None).save_pretrained(tmp_path / "attention")
    peft_moe_compat.deactivate()
    from peft.utils.hotswap import hotswap_adapter

    peft_moe_compat.activate()
    with pytest.raises(AdapterError, match=r"Call peft\.utils\.hotswap\.hotswap_adapter"):
        hotswap_adapter(model, str(tmp_path / "experts"), adapter_name="default", torch_device="cpu")
    attention = zoo.peft_model(fresh(), target_modules=["q_proj"], target_parameters=None)
    hotswap_adapter(attention, str(tmp_path / "attention"), adapter_name="default", torch_device="cpu")


def compile_experts(model, which=slice(None)):
    outermost = [name for name, module in model.named_modules() if module in zoo.wrappers(model)]
    for path in [name for name in outermost if not name.endswith("base_layer")][which]:
        block, _, experts = path.rpartition(".")
        setattr(model.get_submodule(block), experts, torch.compile(model.get_submodule(path), backend="eager"))


@pytest.mark.parametrize("compiled", [None, slice(1), slice(None)], ids=["plain", "partly compiled", "compiled"])
@pytest.mark.parametrize("saved", [slice(0), slice(1), slice(None)], ids=["from plain", "from partly", "from compiled"])
@pytest.mark.parametrize("change", [None, flipped], ids=["as it is", "flipped"])
def test_compiled_modules_are_loaded_by_the_names_they_had(tmp_path, change, saved, compiled):
    """torch.compile(module), unlike module.compile(), gives the tensors below it names of its own."""
    folder = tmp_path / "adapter"
    expected, fresh = save(folder)
    compile_experts(expected, saved)
    expected.save_pretrained(folder)
    if saved == slice(None):
        assert all("_orig_mod" in name for name in load_file(folder / "adapter_model.safetensors"))
    if change is not None:
        rewrite(folder, change)
    if compiled is None:
        model = PeftModel.from_pretrained(fresh(), folder)
    else:
        model = zoo.peft_model(fresh())
        compile_experts(model, compiled)
        model.load_adapter(folder, "default")
    assert_equal(model, expected)
    if change is None:  # the stamp says how it is laid out
        base = expected.get_base_model().config.to_dict()
        peft_moe_compat.convert_adapter(folder, tmp_path / "out", to=HERE, model=base)
        assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "_orig_mod" in name]


@pytest.mark.parametrize("above", ["itself", "block", "layer"])
def test_lora_that_peft_does_not_find_while_saving_is_missed(tmp_path, above, stock):
    """torch's checkpoint_wrapper on a part of the model: newer PEFTs look tensors up by names they do not have."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, _ = save(tmp_path / "whole")
    found = zoo.wrappers(model)[0]
    path = next(name for name, module in model.named_modules() if module is found)
    path = ".".join(path.split(".")[: {"itself": None, "block": -1, "layer": -2}[above]])
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, checkpoint_wrapper(model.get_submodule(path)))
    whole, part = (tmp_path / folder / "adapter_model.safetensors" for folder in ("whole", "part"))
    stock(model.save_pretrained, tmp_path / "stock")
    lost = load_file(whole).keys() - load_file(tmp_path / "stock" / "adapter_model.safetensors").keys()
    if not lost:
        model.save_pretrained(tmp_path / "part")
        assert load_file(part).keys() == load_file(whole).keys()
        return
    with pytest.raises(AdapterError, match=r"found no LoRA of [12] expert parameters.*checkpoint_wrapper"):
        model.save_pretrained(tmp_path / "part")
    assert not part.exists()


def test_tensors_that_upstream_loses_on_the_way_are_missed(tmp_path, monkeypatch):
    """As transformers 5.0 does to gpt_oss in `model.load_adapter`, with no more than a line in its report."""
    _, fresh = save(tmp_path)
    stock_setter = peft.peft_model.set_peft_model_state_dict

    def lossy(model, weights, **options):
        return stock_setter(model, {n: t for n, t in weights.items() if "lora_B" not in n}, **options)

    monkeypatch.setattr(peft.peft_model, "set_peft_model_state_dict", lossy)
    with pytest.raises(LayoutError, match="did not reach the model"):
        PeftModel.from_pretrained(fresh(), tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38, -3e38])
def test_numbers_that_are_not_finite_hide_nothing(tmp_path, monkeypatch, number):
    """One in each of the factors: the file loads as it is, and not with the factors of its experts exchanged."""
    _, fresh = save(tmp_path)

    def spoiled(tensors):
        for name in (n for n in tensors if "experts" in n):
            tensors[name].view(-1)[0] = number
        return tensors

    stock_setter = peft.peft_model.set_peft_model_state_dict

    def turned(model, weights, **options):
        found = {n: t.roll(t.shape[0] // E, 0) if "experts" in n and "lora_A" in n else t for n, t in weights.items()}
        return stock_setter(model, found, **options)

    change_file(tmp_path, spoiled)
    with written_by(HERE):
        PeftModel.from_pretrained(fresh(), tmp_path)
        monkeypatch.setattr(peft.peft_model, "set_peft_model_state_dict", turned)
        with pytest.raises(LayoutError, match="did not reach the model"):
            PeftModel.from_pretrained(fresh(), tmp_path)


def test_experts_that_do_not_say_how_they_are_stored_are_read_as_peft_takes_them(tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = torch.nn.Parameter(torch.zeros(E, 4, 5))

    def fresh():
        return torch.nn.ModuleDict({"experts": Experts()})

    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.stack"])
    expected = peft.get_peft_model(fresh(), config)
    zoo.randomise(expected)
    expected.save_pretrained(tmp_path)
    for change in (lambda A, B, E: (A, B), flipped):
        assert_equal(PeftModel.from_pretrained(fresh(), rewrite(tmp_path, change)), expected)


def test_names_that_a_key_mapping_changes_are_followed(tmp_path):
    expected, fresh = save(tmp_path)
    rewrite(tmp_path, flipped)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {n.replace("model.model.", "model.decoder."): t for n, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    mapping = {"^decoder": "model", "^model": "nowhere"}  # a name takes the first that fits it, and no other
    model = PeftModel.from_pretrained(fresh(), tmp_path, key_mapping=mapping)
    assert_equal(model, expected)


def test_folders_in_folders_and_the_hubs_cache_are_found(tmp_path, caplog):
    expected, fresh = save(tmp_path / "run" / "best")
    rewrite(tmp_path / "run" / "best", flipped)
    assert_equal(PeftModel.from_pretrained(fresh(), tmp_path / "run", subfolder="best"), expected)
    cached = tmp_path / "models--someone--adapter"
    (cached / "snapshots").mkdir(parents=True)
    (tmp_path / "run" / "best").rename(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    caplog.set_level(logging.INFO, "peft_moe_compat")
    model = PeftModel.from_pretrained(fresh(), "someone/adapter", cache_dir=str(tmp_path))
    assert_equal(model, expected)
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("target", [None, "nowhere"])
def test_links_that_lead_nowhere_are_named_before_the_model_is_touched(tmp_path, name, target):
    _, fresh = save(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(target or name)
    base = fresh()
    with pytest.raises(AdapterFileError, match=f"{name} is no ordinary file"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not zoo.wrappers(base)


def test_whatever_upstream_cannot_find_upstream_reports(tmp_path, stock):
    _, fresh = save(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    for adapter in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises((OSError, ValueError)) as theirs:
            stock(PeftModel.from_pretrained, fresh(), str(adapter))
        with pytest.raises(type(theirs.value)) as ours:
            PeftModel.from_pretrained(fresh(), str(adapter))
        assert str(ours.value) == str(theirs.value)


def test_adapters_without_expert_lora_are_none_of_its_business(tmp_path, monkeypatch, caplog):
    expected, fresh = save(tmp_path, target_parameters=None, target_modules=["q_proj"])
    caplog.set_level(logging.INFO, "peft_moe_compat")
    model = PeftModel.from_pretrained(fresh(), tmp_path)
    assert told(caplog) == []
    pairs = zip(model.named_parameters(), expected.named_parameters(), strict=True)
    assert all(torch.equal(found, wanted) for (_, found), (_, wanted) in pairs)
    # Nor is a model without experts.
    monkeypatch.setattr("peft_moe_compat.patching.opening.open_adapter", lambda *given: pytest.fail("was opened"))
    dense = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 3)})
    peft.get_peft_model(dense, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "dense")
    PeftModel.from_pretrained(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 3)}), tmp_path / "dense")


@pytest.mark.parametrize(
    "targets",
    [
        {},  # what the installed PEFT writes
        {"target_parameters": None, "target_modules": ["q_proj", "up_proj"]},
        {"target_parameters": None, "target_modules": ["mlp.experts.3.down_proj"]},
        {"target_parameters": None, "target_modules": "experts"},
        {"target_parameters": None, "target_modules": ".*proj"},
    ],
)
def test_a_pickle_that_may_hold_experts_lora_is_refused(tmp_path, targets):
    wrapped, fresh = save(tmp_path)
    wrapped.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | targets))
    with pytest.raises(AdapterFileError, match="a pickle, and only safetensors are read: save its tensors again"):
        PeftModel.from_pretrained(fresh(), tmp_path)
    holder = PeftModel(fresh(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterFileError, match="a pickle, and only safetensors are read"):
        holder.load_adapter(tmp_path, "other")
    assert list(holder.peft_config) == ["default"]


def shard(folder):
    """Leaves an adapter in two shards and their index."""
    single, names = folder / "adapter_model.safetensors", {}
    tensors = list(load_file(single).items())
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        names |= dict.fromkeys(dict(part), f"adapter_model-0000{number}-of-00002.safetensors")
        save_file(dict(part), folder / f"adapter_model-0000{number}-of-00002.safetensors", {"format": "pt"})
    single.unlink()
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_shards_that_upstream_does_not_look_for_are_joined_by_convert(tmp_path):
    wrapped, fresh = save(tmp_path / "shards")
    adapter = shard(tmp_path / "shards")
    base = fresh()
    for load in (lambda: PeftModel.from_pretrained(base, adapter), lambda: base.load_adapter(str(adapter))):
        with pytest.raises(LayoutError, match=r"in shards .*none. `peft-moe-compat convert .*shards OUT .*joins them"):
            load()
        assert not zoo.wrappers(base)
    convert_adapter(adapter, tmp_path / "joined", to="peft", model=base.config.to_dict())
    assert_equal(PeftModel.from_pretrained(base, tmp_path / "joined"), wrapped)


def test_shards_without_experts_lora_are_for_upstream_to_report(tmp_path, stock):
    _, fresh = save(tmp_path, target_parameters=None, target_modules=["q_proj"])
    shard(tmp_path)
    with pytest.raises((OSError, ValueError)) as theirs:
        stock(PeftModel.from_pretrained, fresh(), str(tmp_path))
    with pytest.raises(type(theirs.value)) as ours:
        PeftModel.from_pretrained(fresh(), str(tmp_path))
    assert str(ours.value) == str(theirs.value)


def test_a_pickle_without_experts_lora_is_pefts_own(tmp_path):
    expected, fresh = save(tmp_path, target_parameters=None, target_modules=["q_proj"])
    expected.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    model = PeftModel.from_pretrained(fresh(), tmp_path)
    pairs = zip(model.named_parameters(), expected.named_parameters(), strict=True)
    assert all(torch.equal(found, wanted) for (_, found), (_, wanted) in pairs)


@pytest.mark.parametrize("biases", [["down_proj_bias"], ["down_proj_bias", "gate_up_proj_bias"]])
@pytest.mark.parametrize("weights", [[], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_biases_of_experts_may_have_lora_too(tmp_path, weights, biases, stock):
    targets = [f"experts.{name}" for name in weights + biases]
    if len(weights) == 1:  # on the first layer alone
        targets = ["experts.down_proj", "layers.0.mlp.experts.down_proj_bias"]
    expected, fresh = save(tmp_path, family="gpt_oss", target_parameters=targets)
    if peft.__version__ == "0.19.0" and len(targets) > 1:
        # It turns the LoRA of a matrix round too, and its own forward fails on that.
        with pytest.raises((LayoutError, AdapterFileError), match="its forward would fail|fits no stack"):
            PeftModel.from_pretrained(fresh(), tmp_path)
        return
    assert_equal(stock(PeftModel.from_pretrained, fresh(), tmp_path), expected)
    assert_equal(PeftModel.from_pretrained(fresh(), tmp_path), expected)


def test_stacks_that_peft_would_leave_out_are_an_error(tmp_path):
    _, fresh = save(tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "experts" not in name}
    stem = next(iter(tensors)).partition("self_attn")[0] + "mlp.experts.down_proj"
    tensors |= {f"{stem}.lora_A.weight": torch.randn(E, 2, 12), f"{stem}.lora_B.weight": torch.randn(E, 24, 2)}
    save_file(tensors, file, metadata={"format": "pt"})
    rewrite(tmp_path, target_parameters=[])
    with pytest.raises(LayoutError, match="convert .* --to peft"):
        PeftModel.from_pretrained(fresh(), tmp_path)


def test_everything_comes_back():
    peft_moe_compat.deactivate()
    before = [r.there() for r in replacements()]
    with peft_moe_compat.activate():
        during = [r.there() for r in replacements()]
        assert all(ours is not theirs for ours, theirs in zip(during, before, strict=True))
    assert all(now is was for now, was in zip((r.there() for r in replacements()), before, strict=True))


def calling_on(stock, calls):
    """Somebody else's function around one that is there."""
    if isinstance(stock, classmethod):
        return classmethod(calling_on(stock.__func__, calls))

    def foreign(*args, **kwargs):
        calls.append(stock)
        return stock(*args, **kwargs)

    return foreign


def test_what_wraps_a_loader_and_calls_on_stays_and_ours_is_on_top_of_it(tmp_path):
    """ms-swift's around `PeftModel.load_adapter`, and the like around every function but forwards."""
    expected, fresh = save(tmp_path)
    rewrite(tmp_path, flipped, peft_version=written_otherwise())
    peft_moe_compat.deactivate()
    calls, before = [], [(r, r.there()) for r in replacements() if type(r) is Replacement]
    try:
        for replacement, stock in before:
            replacement.put(calling_on(stock, calls))
        theirs = [r.there() for r, _ in before]
        for _ in range(2):
            with peft_moe_compat.activate():
                assert_equal(PeftModel.from_pretrained(fresh(), tmp_path), expected)
            assert [r.there() for r, _ in before] == theirs
        assert len(calls) > 4
    finally:
        for replacement, stock in before:
            replacement.put(stock)


def test_a_loader_wrapped_on_top_of_ours_goes_on_when_ours_is_off_and_on_again():
    peft_moe_compat.deactivate()
    stock, calls = vars(PeftModel)["load_adapter"], []
    peft_moe_compat.activate()
    ours = vars(PeftModel)["load_adapter"]
    PeftModel.load_adapter = theirs = calling_on(ours, calls)
    try:
        peft_moe_compat.deactivate()
        assert vars(PeftModel)["load_adapter"] is theirs
        with peft_moe_compat.activate():  # on top of theirs, and the one below does no more than call on
            assert vars(PeftModel)["load_adapter"] is not theirs
        assert vars(PeftModel)["load_adapter"] is theirs
        PeftModel.load_adapter = ours  # as they found it
        with peft_moe_compat.activate():
            assert below(vars(PeftModel)["load_adapter"]) is not ours
        assert vars(PeftModel)["load_adapter"] is stock
    finally:
        PeftModel.load_adapter = stock
