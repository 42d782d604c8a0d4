"""State dicts without a file: converted or taken as they are where that can be told, refused where it cannot."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model
from packaging.version import Version
from peft.utils import hotswap
from safetensors.torch import load_file
from support import zoo
from support.processes import result_of
from support.saved_adapters import HERE, SQUARE, E, assert_equal, flipped, save, written_otherwise
from torch.distributed.fsdp import StateDictType

from peft_moe_compat.errors import AdapterError, AmbiguousAdapterError, LayoutError
from peft_moe_compat.patching.opening import written_by

# Without a gate, what was made for up fits where down's is held, the other way round.
GATED = [family for family in zoo.FAMILIES if family != "nemotron_h"]
SQUARES = {"sizes": SQUARE, "target_parameters": ["experts.down_proj"]}


def turned(tensors):
    """The expert pairs laid out the other way, in a plain dict."""
    found = dict(tensors)
    for name in [n for n in found if "experts" in n and ".lora_A." in n]:
        other = name.replace(".lora_A.", ".lora_B.")
        found[name], found[other] = flipped(found[name], found[other], E)
    return found


def target(fresh, expected):
    """Another model, with LoRA of other numbers where the first has its."""
    config = expected.peft_config["default"]
    return zoo.peft_model(fresh(), target_parameters=config.target_parameters, target_modules=config.target_modules)


@pytest.mark.parametrize("family", GATED)
def test_of_another_layout_is_converted_and_of_this_one_taken(family, tmp_path):
    expected, fresh = save(tmp_path, family)
    right = load_file(tmp_path / "adapter_model.safetensors")
    for tensors in (right, turned(right)):
        model = target(fresh, expected)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        result = peft.set_peft_model_state_dict(model, tensors)
        assert_equal(model, expected)
        assert result.unexpected_keys == []
        assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def test_by_position_and_under_another_name(tmp_path):
    expected, fresh = save(tmp_path)
    tensors = turned(load_file(tmp_path / "adapter_model.safetensors"))
    lora = {k: getattr(expected.peft_config["default"], k) for k in ("target_parameters", "target_modules")}
    model = zoo.peft_model(fresh(), "other", **lora)
    peft.set_peft_model_state_dict(model, tensors, "other")
    assert_equal(model, expected, "other")


def test_square_ones_that_carry_nothing_are_refused_until_it_is_said_who_wrote_them(tmp_path):
    expected, fresh = save(tmp_path, **SQUARES)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    model = target(fresh, expected)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AmbiguousAdapterError, match="its shapes fit either way") as caught:
        peft.set_peft_model_state_dict(model, tensors)
    assert HERE in str(caught.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    other = f"peft=={written_otherwise()},transformers=={transformers.__version__}"
    for release, given in ((HERE, tensors), (other, turned(tensors))):
        model = target(fresh, expected)
        with written_by(release):
            peft.set_peft_model_state_dict(model, given)
        assert_equal(model, expected)


def pickled(tensors):
    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def said_otherwise(tensors):
    """As the other layout's release gives it: the state dict of a file that has its own stamp."""
    (entry,) = tensors._metadata.values()
    right, wrong = sorted(("linear", "reversed"), key=lambda word: word not in entry["said"])
    found = OrderedDict(turned(tensors))
    name = entry["name"]
    sample = found[name].reshape(-1)[:8].tolist()
    said = entry["said"].replace(f'"{right}"', f'"{wrong}"')
    found._metadata = OrderedDict(peft_moe_compat={"name": name, "said": said, "sample": sample})
    return found


@pytest.mark.parametrize("carry", [lambda tensors: tensors, pickled, said_otherwise])
def test_square_ones_carry_their_layout(tmp_path, carry):
    expected, fresh = save(tmp_path, **SQUARES)
    model = target(fresh, expected)
    peft.set_peft_model_state_dict(model, carry(peft.get_peft_model_state_dict(expected)))
    assert_equal(model, expected)


def test_a_layout_is_not_that_of_numbers_put_in_later(tmp_path):
    """As torch.distributed.checkpoint fills the state dict that it is given."""
    expected, fresh = save(tmp_path, **SQUARES)
    model = target(fresh, expected)
    filled = peft.get_peft_model_state_dict(target(fresh, expected))
    for name, tensor in turned(peft.get_peft_model_state_dict(expected)).items():
        with torch.no_grad():
            filled[name].copy_(tensor)
    with pytest.raises(AmbiguousAdapterError):
        peft.set_peft_model_state_dict(model, filled)


def test_what_get_peft_model_state_dict_gives_is_what_it_gave(tmp_path, stock):
    expected, _ = save(tmp_path)
    ours, theirs = peft.get_peft_model_state_dict(expected), stock(lambda: peft.get_peft_model_state_dict(expected))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_packing_that_peft_never_wrote_is_refused_where_the_numbers_show_it(tmp_path):
    """lora_B of experts that differ in size, grouped by expert as Unsloth had it."""
    _, fresh = save(tmp_path, r=8)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    sizes = torch.logspace(-2, 2, E)
    for name, B in tensors.items():
        if "experts" in name and ".lora_B." in name:
            tensors[name] = B * sizes.repeat_interleave(B.shape[1] // E)
    with pytest.raises(AmbiguousAdapterError, match="packing is not settled"):
        peft.set_peft_model_state_dict(zoo.peft_model(fresh(), r=8), tensors)


def test_stacks_are_refused_and_what_has_no_experts_is_pefts(tmp_path):
    expected, fresh = save(tmp_path)
    path, r = zoo.wrappers(expected)[0].get_base_layer(), expected.peft_config["default"].r
    path = next(name for name, module in expected.named_modules() if module is path).replace(".base_layer", "")
    shapes = {"A": (E, r, 32), "B": (E, 48, r)}
    stacks = {f"{path}.gate_up_proj.lora_{factor}.weight": torch.zeros(shape) for factor, shape in shapes.items()}
    with pytest.raises(LayoutError, match="as stacks"):
        peft.set_peft_model_state_dict(target(fresh, expected), stacks)
    model = target(fresh, expected)
    assert peft.set_peft_model_state_dict(model, {}).unexpected_keys == []
    alone = {"base_model.model.nowhere.lora_A.weight": torch.zeros(2, 2)}
    assert peft.set_peft_model_state_dict(model, alone).unexpected_keys


def test_meta_tensors_have_nothing_to_be_told(tmp_path):
    expected, fresh = save(tmp_path, **SQUARES)
    config = expected.peft_config["default"]
    model = peft.PeftModel(fresh(), config, low_cpu_mem_usage=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(model, {n: t.to("meta") for n, t in tensors.items()}, low_cpu_mem_usage=True)
    assert all(wrapper.lora_A["default"].weight.is_meta for wrapper in zoo.wrappers(model))


def fsdp(kind):
    """What accelerate's functions ask of a plugin and an accelerator, of FSDP2 in one process."""
    kind = getattr(StateDictType, f"{kind}_STATE_DICT")
    config = SimpleNamespace(offload_to_cpu=False, rank0_only=False)
    PartialState(cpu=True)
    plugin = SimpleNamespace(state_dict_type=kind, fsdp_version=2, state_dict_config=config)
    alone = {"num_processes": 1, "process_index": 0, "is_fsdp2": True, "is_main_process": True}
    return plugin, SimpleNamespace(wait_for_everyone=lambda: None, **alone)


def replaced_in_the_file(folder, change):
    """What lies in accelerate's file is what was there before, and its metadata is lost."""
    file = folder / "pytorch_model_fsdp.bin"
    torch.save(change(torch.load(file, weights_only=True)), file)


@pytest.mark.parametrize("adapter_only", [True, False])
@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_accelerates_fsdp_files(tmp_path, kind, adapter_only):
    expected, fresh = save(tmp_path / "adapter")
    save_fsdp_model(*fsdp(kind), expected, str(tmp_path), adapter_only=adapter_only)
    model = target(fresh, expected)
    load_fsdp_model(*fsdp(kind), model, str(tmp_path), adapter_only=adapter_only)
    assert_equal(model, expected)


@pytest.mark.parametrize("adapter_only", [True, False])
def test_accelerates_fsdp_files_of_square_ones(tmp_path, adapter_only):
    expected, fresh = save(tmp_path / "adapter", **SQUARES)
    save_fsdp_model(*fsdp("FULL"), expected, str(tmp_path), adapter_only=adapter_only)
    model = target(fresh, expected)
    load_fsdp_model(*fsdp("FULL"), model, str(tmp_path), adapter_only=adapter_only)
    assert_equal(model, expected)
    replaced_in_the_file(tmp_path, dict)
    model = target(fresh, expected)
    with pytest.raises(AmbiguousAdapterError):
        load_fsdp_model(*fsdp("FULL"), model, str(tmp_path), adapter_only=adapter_only)
    with written_by(HERE):
        load_fsdp_model(*fsdp("FULL"), model, str(tmp_path), adapter_only=adapter_only)
    assert_equal(model, expected)
    other = f"peft=={written_otherwise()},transformers=={transformers.__version__}"
    with written_by(other), pytest.raises(AdapterError, match="not converted"):
        load_fsdp_model(*fsdp("FULL"), model, str(tmp_path), adapter_only=adapter_only)


def test_accelerates_sharded_files_of_square_ones_do_not_say(tmp_path):
    expected, fresh = save(tmp_path / "adapter", **SQUARES)
    save_fsdp_model(*fsdp("SHARDED"), expected, str(tmp_path), adapter_only=True)
    model = target(fresh, expected)
    with pytest.raises(AmbiguousAdapterError):
        load_fsdp_model(*fsdp("SHARDED"), model, str(tmp_path), adapter_only=True)
    with written_by(HERE):
        load_fsdp_model(*fsdp("SHARDED"), model, str(tmp_path), adapter_only=True)
    assert_equal(model, expected)


def named(tensors):
    """As `hotswap_adapter_from_state_dict` takes them, with the adapter's name in theirs."""
    return {re.sub(r"(lora_[AB])", r"\1.default", name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", GATED)
def test_hot_swapped_without_a_file(family, tmp_path):
    expected, fresh = save(tmp_path, family)
    right = load_file(tmp_path / "adapter_model.safetensors")
    config = expected.peft_config["default"]
    for tensors in (right, turned(right)):
        model = target(fresh, expected)
        hotswap.hotswap_adapter_from_state_dict(model, named(tensors), "default", config)
        assert_equal(model, expected)


def test_square_ones_are_not_hot_swapped(tmp_path):
    expected, fresh = save(tmp_path, **SQUARES)
    tensors, config = load_file(tmp_path / "adapter_model.safetensors"), expected.peft_config["default"]
    model = target(fresh, expected)
    with pytest.raises(AmbiguousAdapterError):
        hotswap.hotswap_adapter_from_state_dict(model, named(tensors), "default", config)
    with written_by(HERE):
        hotswap.hotswap_adapter_from_state_dict(model, named(tensors), "default", config)
    assert_equal(model, expected)


TRANSFORMERS_SCRIPT = """
import json, pathlib, tempfile
import peft_moe_compat, torch
from packaging.version import Version
from peft.utils import hotswap
from safetensors.torch import load_file
from patching.test_given import GATED, LayoutError, save, turned, zoo

def updates(model):
    return [wrapper.get_delta_weight("default").detach() for wrapper in zoo.wrappers(model)]

saved = {}
for family in GATED:
    folder = pathlib.Path(tempfile.mkdtemp())
    expected, fresh = save(folder, family)
    tensors = load_file(folder / "adapter_model.safetensors")
    saved[family] = updates(expected), fresh, expected.peft_config["default"], tensors
found = {}
for family, (expected, fresh, config, right) in saved.items():
    for tensors in (right, turned(right)):
        model = fresh()
        try:
            model.load_adapter(peft_config=config, adapter_state_dict=tensors)
        except LayoutError as error:
            assert "Known of PEFT" in str(error)
            found[family] = "upstream"
            continue
        torch.testing.assert_close(updates(model), expected)
        found[family] = "right"
print("RESULT" + json.dumps(found))
"""


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.5") and Version(peft.__version__) < Version("0.19"),
    reason="transformers 5.5 loads by peft.utils.transformers_weight_conversion, which PEFT 0.19 brought",
)
def test_transformers_load_adapter_without_a_file():
    """In a process of its own: transformers 5.0 to 5.12 rewrite PEFT when this is called."""
    assert result_of(TRANSFORMERS_SCRIPT).keys() == set(GATED)
