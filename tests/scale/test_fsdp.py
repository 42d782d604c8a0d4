"""FSDP2 on gloo ranks, by torch's fully_shard and by accelerate's plugin, against stock PEFT in one process."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from support import zoo
from torch import Tensor, nn

import peft_moe_compat
from peft_moe_compat.errors import AdapterError, PeftMoeCompatError

from . import models
from .ranks import run

# Of float32 sums taken in another order, against the largest entry, over three steps.
TOLERANCE = 2e-5


def _shard(model: Any, units: str = "layer", **options: Any) -> None:
    """fully_shard on every decoder layer and the root, in place.

    Args:
        units: What is a group of its own besides: "experts", both the wrapped and the bare experts module; "chain",
            every wrapper and the bare module; "experts without layers"; "lora", each factor; "layer", nothing.
        options: Of `fully_shard`.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in models.decoder_layers(model):
        wrapped = models.outermost(getattr(layer, "_checkpoint_wrapped_module", layer))
        bare = wrapped.get_base_layer()
        apart = {"chain": [bare, wrapped.base_layer, wrapped], "layer": []}.get(units, [bare, wrapped])
        if units == "lora":
            apart = [m for m in wrapped.modules() if isinstance(m, nn.Linear)]
        for module in apart:
            fully_shard(module, **options)
        if units != "experts without layers":
            fully_shard(layer, **options)
    fully_shard(model, **options)


def _checkpoint(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = models.decoder_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)


def _checkpoint_in_transformers(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _lora(model: Any) -> set[nn.Parameter]:
    return {p for p in model.parameters() if p.requires_grad}


def _average_lora_gradients(model: Any) -> None:
    """What a training script does for adapters that FSDP2 is told to ignore."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not hasattr(parameter, "full_tensor"), f"{name} was meant to be replicated"
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _bfloat16(**options: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)} | options


def _offloaded() -> dict[str, Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return {"offload_policy": CPUOffloadPolicy(pin_memory=False)}  # pinning needs an accelerator


# name -> (before sharding, arguments of _shard, forwards per module and microbatch)
ARRANGEMENTS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "layers": (None, {}, 1),
    "layers-kept-gathered": (None, {"reshard_after_forward": False}, 1),
    "experts-apart": (None, {"units": "experts"}, 1),
    "experts-apart-kept-gathered": (None, {"units": "experts", "reshard_after_forward": False}, 1),
    "experts-without-layers": (None, {"units": "experts without layers"}, 1),
    "every-wrapper-apart": (None, {"units": "chain"}, 1),
    "checkpointing-of-transformers": (_checkpoint_in_transformers, {}, 2),
    "checkpoint-wrapper": (_checkpoint, {}, 2),
    "checkpoint-wrapper-experts-apart": (_checkpoint, {"units": "experts"}, 2),
    "cpu-offload": (None, _offloaded(), 1),
}
FEW = ("layers", "experts-apart")


def _sharded(family: str, arrangement: str) -> Any:
    prepare, arguments, _ = ARRANGEMENTS[arrangement]
    model = models.lora_model(family)
    if prepare is not None:
        prepare(model)
    _shard(model, **arguments)
    return model


def _facts(model: Any) -> list[tuple[str, ...]]:
    """What the report says of every parameter, its reason and the module's name included."""
    rows = peft_moe_compat.report(model).rows
    return [
        (models.plain_name(f"{row.module}.{p.name}."), p.shape, p.path, p.reason, p.adapters)
        for row in rows
        for p in row.parameters
    ]


def _train(family: str, arrangement: str) -> dict[str, Any]:
    model = _sharded(family, arrangement)
    return {"report": _facts(model), "tensors": models.train(model, models.batches())}


def _train_replicated(family: str, _: str) -> dict[str, Any]:
    model = models.lora_model(family)
    _shard(model, ignored_params=_lora(model))
    told = _facts(model)
    tensors = models.train(model, models.batches(), after_backward=lambda: _average_lora_gradients(model))
    return {"tensors": tensors, "report": told}


def _train_accumulated(family: str, _: str) -> dict[str, Any]:
    model = models.lora_model(family)
    _shard(model, units="experts")
    told, parts = _facts(model), models.BATCH // dist.get_world_size()

    @contextmanager
    def microbatch(last: bool) -> Any:
        model.set_requires_gradient_sync(last)
        yield

    tensors = models.train(model, models.batches(), microbatch=microbatch, microbatches=parts)
    return {"tensors": tensors, "report": told}


OTHERWISE = {"replicated": _train_replicated, "accumulated": _train_accumulated}


def _train_all(arrangements: tuple[str, ...], families: tuple[str, ...] = models.FAMILIES) -> dict[Any, Any]:
    """On every rank: each family in each arrangement, trained; what rank 0 found of it."""
    calls, found = models.Calls(), {}
    for family in families:
        for name in arrangements:
            found[family, name] = OTHERWISE.get(name, _train)(family, name) | {"calls": calls.taken()}
    return found if dist.get_rank() == 0 else {}


@pytest.fixture(scope="module")
def single():
    """family -> losses, gradients and parameters of stock PEFT in one process, and the report before it."""
    found = {}
    peft_moe_compat.deactivate()
    try:
        for family in models.FAMILIES:
            found[family] = models.train(models.lora_model(family), models.batches())
    finally:
        peft_moe_compat.activate()
    return found


@pytest.fixture(scope="module")
def on_two():
    return run(2, _train_all, (*ARRANGEMENTS, *OTHERWISE))[0]


@pytest.fixture(scope="module")
def on_one():
    return run(1, _train_all, FEW)[0]


def _check(found: dict[str, Any], expected: dict[str, Tensor], family: str, forwards: int) -> None:
    """Numbers of one process; every forward the library's own; and a report that does not notice the sharding."""
    zoo.assert_same(found["tensors"], expected, TOLERANCE)
    assert found["calls"] == models.LAYERS * models.STEPS * forwards
    assert found["report"] == _facts(models.lora_model(family))
    assert {path for _, _, path, _, _ in found["report"]} == {"grouped_mm"}


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("arrangement", [*ARRANGEMENTS, *OTHERWISE])
def test_training_on_two_ranks(on_two, single, arrangement, family):
    forwards = ARRANGEMENTS[arrangement][2] if arrangement in ARRANGEMENTS else 1
    microbatches = models.BATCH // 2 if arrangement == "accumulated" else 1
    _check(on_two[family, arrangement], single[family], family, forwards * microbatches)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("arrangement", FEW)
def test_training_on_one_rank(on_one, single, arrangement, family):
    _check(on_one[family, arrangement], single[family], family, 1)


@pytest.mark.parametrize("family", ["gpt_oss"])
@pytest.mark.parametrize("arrangement", ["experts-apart"])
def test_training_on_four_ranks(single, arrangement, family):
    """The 18 rows of a factor are not shared evenly."""
    found = run(4, _train_all, (arrangement,), (family,))[0]
    _check(found[family, arrangement], single[family], family, 1)


def _others(folder: str) -> dict[str, Any]:
    """On every rank: low precision, files, refusals, and accelerate."""
    calls, found = models.Calls(), {}
    for family in models.FAMILIES:
        calls.taken()
        model = models.lora_model(family)
        _shard(model, **_bfloat16(units="experts"))
        found["bfloat16", family] = models.train(model, models.batches(1)), calls.taken()
        found["files", family] = _files(family, Path(folder, family))
    found["refused"] = _refusal(_sharded_by("lora"))
    found["unsharded factors"] = _save_without_gathering(Path(folder, "ungathered"))
    for name, options in ACCELERATE.items():
        calls.taken()
        found["accelerate", name] = _accelerate(Path(folder, name), **options), calls.taken()
    return found


def _sharded_by(units: str) -> Any:
    model = models.lora_model("qwen3_moe")
    _shard(model, units=units)
    return model


def _gathered(model: Any) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _files(family: str, folder: Path) -> dict[str, Any]:
    """An adapter saved by a sharded model; loaded and then sharded; and loaded over a sharded one."""
    from peft import PeftModel, get_peft_model_state_dict

    model = _sharded(family, "experts-apart")
    state_dict = _gathered(model)
    by_peft = get_peft_model_state_dict(model, state_dict=state_dict) if state_dict else {}
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state_dict)
    watch = peft_moe_compat.ExpertReadings(model)
    model(input_ids=models.batches()[0]).logits.square().mean().backward()
    readings = [reading for reading in watch.read() if reading.parameter]
    model.zero_grad()
    handed = {to: {n: t.clone() for n, t in peft_moe_compat.adapter_tensors(model, to)} for to in ("peft", "vllm")}
    dist.barrier()
    loaded = PeftModel.from_pretrained(models.base_model(family), folder, is_trainable=True)
    _shard(loaded, units="experts")
    over = models.lora_model(family)
    for parameter in _lora(over):
        nn.init.zeros_(parameter)
    _shard(over, units="experts")
    over.load_adapter(folder, "default", is_trainable=True)
    return {
        "by PEFT": by_peft,
        "handed over": handed,
        "readings": readings,
        "loaded": models.train(loaded, models.batches()),
        "loaded over": models.train(over, models.batches()),
    }


def _refusal(model: Any) -> str:
    with pytest.raises(PeftMoeCompatError) as error:
        model(input_ids=models.batches()[0])
    return str(error.value)


def _save_without_gathering(folder: Path) -> str:
    with pytest.raises(RuntimeError) as error:
        _sharded("qwen3_moe", "layers").save_pretrained(folder / str(dist.get_rank()))
    return str(error.value)


ACCELERATE: dict[str, dict[str, Any]] = {
    "default": {},
    "activation-checkpointing": {"activation_checkpointing": True},
    "ram-efficient": {"cpu_ram_efficient_loading": True},
}


def _accelerate(folder: Path, **options: Any) -> dict[str, Any]:
    """accelerate turns FSDP on for accelerators alone; on the CPU this says it for it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    found_type = accelerator.distributed_type
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = models.lora_model("qwen3_moe")
    optimizer = torch.optim.SGD(list(_lora(model)), lr=0.3)
    model, optimizer = accelerator.prepare(model, optimizer)
    tensors = models.train(model, models.batches(), optimizer=optimizer, backward=accelerator.backward)
    state_dict = {name: models.full(tensor) for name, tensor in accelerator.get_state_dict(model).items()}
    refused = ""
    if accelerator.is_main_process:
        try:
            model.save_pretrained(folder, state_dict=state_dict)
        except AdapterError as error:
            refused = str(error)
    layer = type(models.decoder_layers(model)[0]).__name__
    return {"type": str(found_type), "tensors": tensors, "layer": layer, "report": _facts(model), "refused": refused}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return folder, run(2, _others, str(folder))[0]


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


def _bfloat16_gradients(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of one process whose parameters are rounded for the forward, as MixedPrecisionPolicy does it."""
    model, ids = models.lora_model(family), models.batches(1)[0]
    rounded = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, rounded, kwargs={"input_ids": ids, "labels": ids}).loss.backward()
    return {f"0.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat = [torch.cat([t[name].double().flatten() for name in expected]) for t in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_mixed_precision(others, stock, family):
    """As far from float32 as stock PEFT in bfloat16 in one process is, and much nearer to our own."""
    tensors, calls = others[1]["bfloat16", family]
    exact = stock(_bfloat16_gradients, family, torch.float32)
    assert calls == models.LAYERS
    assert all(tensors[name].dtype == torch.float32 for name in exact)
    assert _relative(tensors, exact) <= 1.05 * _relative(stock(_bfloat16_gradients, family, torch.bfloat16), exact)
    ours = _bfloat16_gradients(family, torch.bfloat16)
    assert 0 < _relative(tensors, ours) <= 0.3 * _relative(ours, exact)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_saved_file_is_that_of_one_process(others, tmp_path, family):
    folder, found = others
    models.lora_model(family).save_pretrained(tmp_path)
    (expected, stamp), (written, metadata) = _read(tmp_path), _read(folder / family)
    assert metadata == stamp
    assert "peft_moe_compat" in stamp
    for tensors in (written, found["files", family]["by PEFT"]):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    one, other = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, folder / family))
    for config in (one, other):
        for targets in ("target_modules", "target_parameters"):
            config[targets].sort()  # PEFT makes sets of them
    assert one == other


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("to", ["peft", "vllm"])
def test_what_is_handed_over_is_that_of_one_process(others, tmp_path, to, family):
    model = models.lora_model(family)
    model.save_pretrained(tmp_path / "saved")
    peft_moe_compat.convert_adapter(tmp_path / "saved", tmp_path / "out", to=to, model=zoo.config_of(model))
    expected, _ = _read(tmp_path / "out")
    zoo.assert_same(others[1]["files", family]["handed over"][to], expected, 0)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_readings_are_those_of_one_process(others, family):
    model = models.lora_model(family)
    watch = peft_moe_compat.ExpertReadings(model)
    model(input_ids=models.batches()[0]).logits.square().mean().backward()
    expected = [reading for reading in watch.read() if reading.parameter]
    found = others[1]["files", family]["readings"]
    assert [(r.module, r.parameter) for r in found] == [(r.module, r.parameter) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.updates == pytest.approx(theirs.updates, rel=1e-4)
        assert ours.gradients == pytest.approx(theirs.gradients, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("how", ["loaded", "loaded over"])
def test_loaded_adapter_trains_as_in_one_process(others, single, how, family):
    zoo.assert_same(others[1]["files", family][how], single[family], TOLERANCE)


def test_a_factor_sharded_by_itself_is_refused(others):
    assert "Give fully_shard the wrapped experts module or its decoder layer" in others[1]["refused"]


def test_saving_without_gathering_fails_in_safetensors(others):
    """Upstream (safetensors with torch 2.13): PEFT's save_pretrained gathers nothing. A gathered state_dict goes in."""
    assert "invalid python storage" in others[1]["unsharded factors"]


@pytest.mark.parametrize("options", ACCELERATE)
def test_accelerate(others, single, tmp_path, options):
    folder, everything = others
    found, calls = everything["accelerate", options]
    assert found["type"] == "DistributedType.MULTI_CPU"
    assert found["layer"].startswith("FSDP")
    _check(found | {"calls": calls}, single["qwen3_moe"], "qwen3_moe", 2 if options.startswith("activation") else 1)
    if options == "activation-checkpointing":
        assert "checkpoint_wrapper" in found["refused"]
        return
    written, metadata = _read(folder / options)
    models.lora_model("qwen3_moe").save_pretrained(tmp_path)
    expected, stamp = _read(tmp_path)
    assert metadata == stamp
    assert written.keys() == expected.keys()
    trained = {n.replace(".default", "").removeprefix("after."): t for n, t in single["qwen3_moe"].items()}
    zoo.assert_same(written, {name: trained[name] for name in written}, TOLERANCE)


def test_peft_saves_nothing_under_checkpoint_wrapper(stock, tmp_path):
    """Upstream (PEFT 0.21.2): save_pretrained looks its tensors up by names that have `_checkpoint_wrapped_module`.

    FSDP is not in play. `gradient_checkpointing_enable` adds no name, and its files are whole.
    """
    model = models.lora_model("qwen3_moe")
    _checkpoint(model)
    stock(model.save_pretrained, tmp_path)
    assert _read(tmp_path)[0] == {}
    with pytest.raises(AdapterError, match="checkpoint_wrapper"):
        model.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "adapter_model.safetensors").exists()


FILES = [(kind, adapter_only) for kind in ("FULL", "SHARDED") for adapter_only in (True, False)]


def _through_accelerates_files(family: str, folder: Path) -> dict[str, list[str]]:
    """Names of LoRA that is not what was saved, once it was loaded into another sharded model; by kind of file."""
    from types import SimpleNamespace

    from accelerate import PartialState
    from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model
    from torch.distributed.fsdp import StateDictType

    PartialState(cpu=True)
    rank, found = dist.get_rank(), {}
    accelerator = SimpleNamespace(
        num_processes=2, process_index=rank, is_main_process=rank == 0, is_fsdp2=True, wait_for_everyone=dist.barrier
    )
    for kind, adapter_only in FILES:
        config = SimpleNamespace(offload_to_cpu=False, rank0_only=False)
        state_dict_type = getattr(StateDictType, f"{kind}_STATE_DICT")
        plugin = SimpleNamespace(state_dict_type=state_dict_type, fsdp_version=2, state_dict_config=config)
        model, other = _sharded(family, "experts-apart"), _sharded(family, "experts-apart")
        for parameter in _lora(other):
            nn.init.zeros_(parameter)
        place = str(folder / f"{kind}-{adapter_only}")
        save_fsdp_model(plugin, accelerator, model, place, adapter_only=adapter_only)
        dist.barrier()
        load_fsdp_model(plugin, accelerator, other, place, adapter_only=adapter_only)
        saved, loaded = _gathered(model), _gathered(other)
        found[f"{kind}-{adapter_only}"] = [
            n for n, t in saved.items() if "lora_" in n and not torch.equal(t, loaded[n])
        ]
        assert rank or any("lora_" in name for name in saved)
    return found


def test_accelerates_files_of_sharded_adapters_arrive(tmp_path: Path) -> None:
    for found in run(2, _through_accelerates_files, "qwen3_moe", tmp_path):
        assert found == {f"{kind}-{adapter_only}": [] for kind, adapter_only in FILES}
