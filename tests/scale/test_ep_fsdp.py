"""Experts spread over ranks and FSDP2 at once, as transformers shards a model while it loads it.

The oracle is stock PEFT in one process, on the whole batch.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from support import zoo

from peft_moe_compat import ParallelismError
from peft_moe_compat.model.sharding import whole

from . import models
from .ranks import run
from .sharded_models import CONFIG, SIZES, TOLERANCE, E, load, stock

# Number of ranks -> what they form. An expert belongs to fsdp * tp / ep ranks of each replica.
LAYOUTS = {
    2: [{"fsdp_size": 2, "ep_size": 2}, {"fsdp_size": 2}],
    4: [
        {"fsdp_size": 4, "ep_size": 4},
        {"fsdp_size": 4, "ep_size": 2},
        {"fsdp_size": 2, "ep_size": 2, "tp_size": 2},
        {"fsdp_size": 2, "ep_size": 2, "tp_size": 2, "ep_implementation": "all_to_all"},
        {"fsdp_size": 2, "ep_size": 2, "tp_size": 2, "ep_implementation": "all_reduce"},
        {"fsdp_size": 2, "ep_size": 4, "tp_size": 2},
        {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
        {"dp_replicate_size": 2, "fsdp_size": 2},
    ],
}
EVERY = [(ranks, layout) for ranks, layouts in LAYOUTS.items() for layout in layouts]


def _name(layout) -> str:
    return ", ".join(f"{key.removesuffix('_size')} {value}" for key, value in layout.items())


def _train(model, layout, steps=models.STEPS):
    """As `models.train`, for ranks of which some share a batch."""
    tp_size = layout.get("tp_size", 1)
    rank, of = dist.get_rank() // tp_size, dist.get_world_size() // tp_size
    rows = [batch.chunk(of)[rank].repeat(dist.get_world_size(), 1) for batch in models.batches(steps)]
    return models.train(model, rows)


def _trained(folder, layout):
    model = PeftModel.from_pretrained(load(f"{folder}/base", layout), f"{folder}/adapter", is_trainable=True)
    model.save_pretrained(f"{folder}/saved {_name(layout)}", is_main_process=dist.get_rank() == 0)
    found = _train(model, layout)
    model.save_pretrained(f"{folder}/trained {_name(layout)}", is_main_process=dist.get_rank() == 0)
    return found


def _made(folder, layout):
    """Initial values of an adapter made by ranks of which each is seeded otherwise, and what this one holds of it."""
    base = load(f"{folder}/base", layout)
    torch.manual_seed(dist.get_rank())
    model = get_peft_model(base, LoraConfig(**CONFIG | {"target_modules": []}))
    lora = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {name: tuple(p.to_local().shape) for name, p in lora.items()}
    return {"initial": {name: whole(p) for name, p in lora.items() if "lora_A" in name}, "held": held}


def _with_dropout(model):
    """Of LoRA on experts alone: PEFT's own, of linears, draws as many numbers as a rank has tokens."""
    for wrapper in zoo.wrappers(model):
        wrapper.lora_dropout["default"] = torch.nn.Dropout(0.5)
    torch.manual_seed(3)
    return model


def _checkpointed(folder, layout):
    """What a first step finds, and what a second one does with a dropout."""
    base = load(f"{folder}/base", layout)
    model = PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True, low_cpu_mem_usage=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    first = _train(model, layout, 1)
    return {"checkpointed": _of_first(first), "dropped": _train(_with_dropout(model), layout, 1)}


def _of_first(found):
    """Loss and gradients of the first step."""
    return {name: tensor for name, tensor in found.items() if name.startswith("0.")}


def _idle(folder, layout):
    """A step where the routers take the same two experts for every token."""
    model = PeftModel.from_pretrained(load(f"{folder}/idle", layout), f"{folder}/adapter", is_trainable=True)
    return _train(model, layout, 1)


def _refusals(folder):
    """Name -> what a rank is told."""
    found = {}

    def attempt(name, function):
        with pytest.raises(ParallelismError) as error:
            function()
        found[name] = str(error.value)

    def loaded():
        return load(f"{folder}/base", LAYOUTS[2][0])

    model = get_peft_model(loaded(), LoraConfig(**CONFIG))
    attempt("second", lambda: model.add_adapter("other", LoraConfig(**CONFIG)))
    attempt("weighted", lambda: model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat"))
    attempt("swapped", lambda: hotswap_adapter(model, f"{folder}/adapter", "default"))
    assert list(model.peft_config) == ["default"]
    attempt("whole modules", lambda: get_peft_model(loaded(), LoraConfig(**CONFIG, modules_to_save=["lm_head"])))
    after = loaded()
    after(input_ids=models.batches()[0])
    attempt("late", lambda: get_peft_model(after, LoraConfig(**CONFIG)))
    older = loaded()
    older.config.distributed_config = SimpleNamespace(fsdp_size=2)
    attempt("older", lambda: get_peft_model(older, LoraConfig(**CONFIG)))
    piped = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    piped.config.distributed_config = SimpleNamespace(pp_size=2)
    attempt("pipeline", lambda: get_peft_model(piped, LoraConfig(**CONFIG)))
    return found


def _on_ranks(folder, layouts):
    """Layout -> what one rank finds."""
    found = {}
    for layout in layouts:
        found[_name(layout)] = {
            "trained": _trained(folder, layout),
            **_checkpointed(folder, layout),
            "idle": _idle(folder, layout),
            **_made(folder, layout),
        }
    return found


def _by_stock(folder):
    model = PeftModel.from_pretrained(load(f"{folder}/base"), folder / "adapter", is_trainable=True)
    found = {"trained": models.train(model, models.batches())}
    model.save_pretrained(folder / "trained by stock")
    idle = PeftModel.from_pretrained(load(f"{folder}/idle"), folder / "adapter", is_trainable=True)
    found["idle"] = models.train(idle, models.batches(1))
    base = load(f"{folder}/base")
    torch.manual_seed(0)
    made = get_peft_model(base, LoraConfig(**CONFIG | {"target_modules": []}))
    found["initial"] = {name: p.detach() for name, p in made.named_parameters() if "lora_A" in name}
    return found


@pytest.fixture(scope="module", params=SIZES)
def cell(request, tmp_path_factory):
    """(folder, stock PEFT's results in one process, layout -> those of every rank)."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = zoo.tiny_model(request.param, **SIZES[request.param])
    model.save_pretrained(folder / "base")
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            parameter.data.zero_()
    model.save_pretrained(folder / "idle")
    with stock():
        model = get_peft_model(load(f"{folder}/base"), LoraConfig(**CONFIG))
        zoo.randomise(model)
        model.save_pretrained(folder / "adapter")
        expected = _by_stock(folder)
    one = PeftModel.from_pretrained(load(f"{folder}/base"), folder / "adapter", is_trainable=True)
    models.train(one, models.batches(1))
    expected["dropped"] = models.train(_with_dropout(one), models.batches(1))
    assert abs(expected["dropped"]["0.loss"] - models.train(one.eval(), models.batches(1))["0.loss"]) > 1e-2
    found = {}
    for count, layouts in LAYOUTS.items():
        ranks = run(count, _on_ranks, str(folder), layouts)
        found |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return folder, expected, found


@pytest.mark.parametrize("layout", [_name(layout) for _, layout in EVERY])
def test_training_equals_one_process_on_the_whole_batch(cell, layout):
    _, expected, found = cell
    assert sum(name.startswith("0.") for name in expected["trained"]) == 1 + 2 * 2 * (2 + 2)
    for rank in found[layout]:
        zoo.assert_same(rank["trained"], expected["trained"], TOLERANCE)
        zoo.assert_same(rank["checkpointed"], _of_first(expected["trained"]), TOLERANCE)


@pytest.mark.parametrize("layout", [_name(layout) for _, layout in EVERY])
def test_dropout_is_that_of_one_process_on_the_whole_batch(cell, layout):
    """Each row of each batch is dropped alike wherever it is computed, and computed again: no two batches share masks.

    What one process drops is tested in `forward`.
    """
    _, expected, found = cell
    for rank in found[layout]:
        zoo.assert_same(rank["dropped"], expected["dropped"], TOLERANCE)


@pytest.mark.parametrize("layout", [_name(layout) for _, layout in EVERY])
def test_ranks_whose_experts_have_no_tokens(cell, layout):
    _, expected, found = cell
    gradient = expected["idle"]["0.base_model.model.model.layers.0.mlp.experts.lora_A.default.weight"]
    assert (gradient.view(E, -1).abs().amax(1) > 0).sum() == 2
    for rank in found[layout]:
        zoo.assert_same(rank["idle"], expected["idle"], TOLERANCE)


@pytest.mark.parametrize("layout", [_name(layout) for _, layout in EVERY])
def test_an_adapter_starts_as_in_one_process_and_is_shared_by_all_ranks(cell, layout):
    _, expected, found = cell
    for rank in found[layout]:
        zoo.assert_same(rank["initial"], expected["initial"], 0)
    sizes = {name: tensor.numel() for name, tensor in expected["initial"].items()}
    replicas = 2 if "dp_replicate" in layout else 1
    for name, size in sizes.items():
        assert sum(torch.Size(rank["held"][name]).numel() for rank in found[layout]) == replicas * size


@pytest.mark.parametrize("layout", [_name(layout) for _, layout in EVERY])
def test_one_file_for_all_ranks(cell, layout):
    """A file loads on any layout, which saves it again bit for bit; what was trained is what one process trained."""
    folder, _, _ = cell
    before, after = (load_file(folder / f / "adapter_model.safetensors") for f in ("adapter", f"saved {layout}"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    names = (f"trained {who}" for who in ("by stock", layout))
    expected, found = (load_file(folder / name / "adapter_model.safetensors") for name in names)
    zoo.assert_same(found, expected, TOLERANCE)


def test_refused_by_name(cell):
    folder, _, _ = cell
    for told in run(2, _refusals, str(folder)):
        for name, words in {
            "second": "a second adapter",
            "weighted": "add_weighted_adapter needs whole adapters",
            "swapped": "set_peft_model_state_dict",
            "whole modules": "modules_to_save",
            "late": "after the model's first forward",
            "older": "Update PEFT to 0.21.1 and transformers to 5.24",
            "pipeline": "pipeline parallelism",
        }.items():
            assert words in told[name]
