"""A training checkpoint of another layout goes on as the run that never stopped, or is refused before it is loaded.

The oracle is that run itself. Checkpoints of other layouts are made of its own, by loops over experts and ranks.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import zoo
from support.processes import result_of
from support.saved_adapters import FAMILY, HERE, LINEARS, SHARED, SQUARE, E, flipped, written_otherwise
from transformers import Trainer, TrainerCallback, TrainingArguments

import peft_moe_compat
from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.errors import AdapterError, AmbiguousAdapterError, CompatWarning, LayoutError
from peft_moe_compat.families import is_rewritten
from peft_moe_compat.patching import resuming
from peft_moe_compat.patching.opening import written_by

STEPS, SAVED_AT, R = 6, 3, 3
DOWN = {"target_parameters": ["experts.down_proj"]}


class Losses(TrainerCallback):
    def __init__(self):
        self.found = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.found[state.global_step] = float(logs["loss"])


def fresh(family=FAMILY, sizes=None, **lora):
    """A model as every process of one training would make it."""
    torch.manual_seed(1)
    model = zoo.tiny_model(family, **(sizes or {}))
    options = {"r": R, "lora_alpha": 5, "target_modules": ["o_proj"]}
    options["target_parameters"] = peft_moe_compat.expert_parameters(model)
    return get_peft_model(model, LoraConfig(**options | lora))


def trainer_of(model, folder, optimizers=(None, None), **options):
    drawn = (torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(i)) for i in range(12))
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=SAVED_AT,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        seed=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    data = [{"input_ids": ids, "labels": ids.flip(0)} for ids in drawn]
    return Trainer(model, arguments, train_dataset=data, callbacks=[Losses()], optimizers=optimizers)


def train(trainer, checkpoint=None):
    """The losses by step."""
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    (losses,) = (each.found for each in trainer.callback_handler.callbacks if isinstance(each, Losses))
    return losses


def whole(folder, model, **options):
    """The run that never stops: its checkpoint in the middle, its losses, and the names of what its optimizer has."""
    names = [name.replace(".default", "") for name, parameter in model.named_parameters() if parameter.requires_grad]
    names.sort(key=lambda name: "norm" in name)  # Trainer keeps those in a second group, without weight decay
    losses = train(trainer_of(model, folder / "whole", **options))
    return folder / "whole" / f"checkpoint-{SAVED_AT}", losses, names


def of_each(entry):
    """What an optimizer keeps of every entry of a parameter."""
    return {key: value for key, value in entry.items() if torch.is_tensor(value) and value.numel() > 1}


def rewrite(checkpoint, names, pair=lambda A, B: (A, B), rename=lambda name: name, **config):
    """A checkpoint in place as another writer lays it out: the adapter, and alike what the optimizer keeps of it."""

    def turn(tensors):
        found = {rename(name): tensor for name, tensor in tensors.items()}
        for name in [n for n in tensors if "experts" in n and ".lora_A." in n]:
            other = name.replace(".lora_A.", ".lora_B.")
            found[rename(name)], found[rename(other)] = pair(tensors[name], tensors[other])
        return {name: tensor.contiguous() for name, tensor in found.items()}

    file, path = checkpoint / "adapter_model.safetensors", checkpoint / "adapter_config.json"
    save_file(turn(load_file(file)), file, metadata={"format": "pt"})  # without the stamp
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with edited(checkpoint) as saved:
        state = saved["state"]
        assert len(state) == len(names)
        assert of_each(state[0])
        for key in of_each(state[0]):
            turned = turn({name: state[i][key] for i, name in enumerate(names)})
            for i, name in enumerate(names):  # the same names in the same order, whatever lies under each
                state[i][key] = turned[name]


@contextmanager
def edited(checkpoint):
    """The content of a checkpoint's `optimizer.pt`, written back at the end of the block."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    yield saved
    torch.save(saved, checkpoint / "optimizer.pt")


def turn_round(checkpoint, names, family=FAMILY):
    rewrite(checkpoint, names, lambda A, B: flipped(A, B, E), peft_version=written_otherwise(family))


def told_by_its_writer(family=FAMILY):
    """What the peft_version of square gpt_oss experts does not tell."""
    return written_by(f"peft=={written_otherwise(family)},transformers=={transformers.__version__}")


def assert_goes_on(checkpoint, losses, model, **options):
    folder = checkpoint.parent.parent / "resumed"
    found = train(trainer_of(model, folder, **options), checkpoint)
    assert found == pytest.approx({step: loss for step, loss in losses.items() if step > SAVED_AT}, rel=1e-5)
    assert len(found) == STEPS - SAVED_AT
    last = f"checkpoint-{STEPS}/adapter_model.safetensors"
    after, expected = load_file(folder / last), load_file(checkpoint.parent / last)
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_other_orientation_goes_on_as_if_never_stopped(family, tmp_path):
    """With Trainer's own optimizer, which is fused where torch has that, and would read past moments too small."""
    checkpoint, losses, names = whole(tmp_path, fresh(family))
    turn_round(checkpoint, names, family)
    assert_goes_on(checkpoint, losses, fresh(family))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_square_experts_too(family, tmp_path):
    checkpoint, losses, names = whole(tmp_path, fresh(family, SQUARE, **DOWN))
    turn_round(checkpoint, names, family)
    with told_by_its_writer(family):
        assert_goes_on(checkpoint, losses, fresh(family, SQUARE, **DOWN))


def grouped(A, B):
    """lora_B's columns by expert instead of by rank."""
    return A, torch.stack([B[:, j * E + e] for e in range(E) for j in range(R)], dim=1)


def test_what_unsloth_groups_by_expert_too(tmp_path):
    checkpoint, losses, names = whole(tmp_path, fresh())
    rewrite(checkpoint, names, grouped, auto_mapping={"unsloth_fixed": True})
    assert_goes_on(checkpoint, losses, fresh())


def test_grouped_and_turned_round_too(tmp_path):
    checkpoint, losses, names = whole(tmp_path, fresh())
    said = {"peft_version": written_otherwise(), "auto_mapping": {"unsloth_fixed": True}}
    rewrite(checkpoint, names, lambda A, B: grouped(*flipped(A, B, E)), **said)
    assert_goes_on(checkpoint, losses, fresh())


def test_the_other_nesting_too(tmp_path):
    inner, outer = ".experts.base_layer.lora_", ".experts.lora_"
    checkpoint, losses, names = whole(tmp_path, fresh())
    rewrite(
        checkpoint,
        names,
        rename=lambda name: name.replace(inner, outer) if inner in name else name.replace(outer, inner),
    )
    assert_goes_on(checkpoint, losses, fresh())


def test_with_groups_of_other_weight_decay_too(tmp_path):
    lora, options = {"modules_to_save": ["norm"]}, {"weight_decay": 0.1}
    checkpoint, losses, names = whole(tmp_path, fresh(**lora), **options)
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert [len(group["params"]) for group in groups][1] == sum("norm" in name for name in names) > 0
    turn_round(checkpoint, names)
    assert_goes_on(checkpoint, losses, fresh(**lora), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch", "optim_args": "amsgrad=True"},
        {"optim": "rmsprop"},
        {"optim": "adagrad"},
    ],
    ids=lambda options: options["optim"],
)
def test_whatever_an_optimizer_keeps_of_every_entry(options, tmp_path):
    checkpoint, losses, names = whole(tmp_path, fresh(), **options)
    turn_round(checkpoint, names)
    assert_goes_on(checkpoint, losses, fresh(), **options)


def test_an_optimizer_that_keeps_nothing_has_nothing_to_convert(tmp_path):
    checkpoint, losses, names = whole(tmp_path, fresh(), optim="sgd")
    file = checkpoint / "adapter_model.safetensors"
    with edited(checkpoint) as saved:
        assert not any(map(of_each, saved["state"].values()))
        saved["state"] = {i: {"of each": torch.zeros(2, 2)} for i in range(len(names))}  # for `rewrite` to turn
        tensors = load_file(file)
        for i, name in enumerate(names):
            saved["state"][i]["of each"] = tensors[name]
    turn_round(checkpoint, names)
    with edited(checkpoint) as saved:
        saved["state"] = {}
    assert_goes_on(checkpoint, losses, fresh(), optim="sgd")


def test_a_checkpoint_of_this_layout_is_left_alone(tmp_path):
    checkpoint, losses, _ = whole(tmp_path, fresh())
    assert_goes_on(checkpoint, losses, fresh())


def in_8_bit(saved):
    for entry in saved["state"].values():
        first = entry.pop("exp_avg")
        entry |= {"state1": torch.zeros(first.shape, dtype=torch.uint8), "qmap1": torch.zeros(256)}


def as_bitsandbytes_saves_it(saved):
    for entry in saved["state"].values():
        first, _ = entry.pop("exp_avg"), entry.pop("exp_avg_sq")
        state = {f"state{i}": torch.zeros(first.shape, dtype=torch.uint8) for i in (1, 2)}
        entry["__bnb_optimizer_quant_state__"] = {**state, "qmap1": torch.zeros(256), "qmap2": torch.zeros(256)}


def ademamix(saved):
    for entry in saved["state"].values():
        state = {"state1": torch.stack([entry.pop("exp_avg")] * 2), "state2": entry.pop("exp_avg_sq")}
        entry["__bnb_optimizer_quant_state__"] = state


def factored(saved):
    for entry in saved["state"].values():
        moment = entry.pop("exp_avg_sq")
        entry |= {"exp_avg_sq_row": moment.mean(1), "exp_avg_sq_col": moment.mean(0)}


def of_fewer(saved):
    saved["param_groups"][0]["params"].pop()


def of_others(saved):
    for entry in saved["state"].values():
        entry |= {key: torch.zeros(7, 7) for key in of_each(entry)}


def in_pieces(saved):
    for entry in saved["state"].values():
        entry["exp_avg"] = [entry["exp_avg"]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (in_8_bit, "holds exp_avg_sq, qmap1, state1, step: 8-bit"),
        (as_bitsandbytes_saves_it, "holds qmap1, qmap2, state1, state2, step: 8-bit"),
        (ademamix, "holds state1, state2, step: 8-bit"),
        (factored, "holds exp_avg, exp_avg_sq_col, exp_avg_sq_row, step: 8-bit and factored states are not converted"),
        (of_fewer, r"it is of \d+ parameters, and the model trains \d+"),
        (of_others, "and has such for 0 .it holds exp_avg, exp_avg_sq, step: of another adapter or layout"),
        (in_pieces, "and has such for 0"),
        (dict.clear, "it holds no state as torch's optimizers save it"),
    ],
)
def test_state_that_cannot_be_converted_is_refused_before_anything_is_loaded(change, says, tmp_path):
    checkpoint, losses, names = whole(tmp_path, fresh())
    turn_round(checkpoint, names)
    with edited(checkpoint) as saved:
        change(saved)
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(model, tmp_path / "resumed")
    with pytest.raises(AdapterError, match=f"The adapter can be converted.*{says}.*Remove .*optimizer.pt to go on"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.optimizer is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    (checkpoint / "optimizer.pt").unlink()
    found = train(trainer, checkpoint)
    assert found[SAVED_AT + 1] == pytest.approx(losses[SAVED_AT + 1], rel=1e-5)  # before its first step
    assert found[STEPS] != pytest.approx(losses[STEPS], rel=1e-5)  # the moments matter


TAKEN = [family for family in SHARED if is_rewritten(family, Version(transformers.__version__))]


@pytest.mark.skipif(
    not (TAKEN and find_spec("peft.utils.transformers_weight_conversion")),
    reason="no names of linears are taken for experts: PEFT before 0.19, or a transformers that fuses none beside them",
)
@pytest.mark.parametrize("family", TAKEN)
def test_linears_that_a_newer_peft_takes_for_experts_are_named_and_the_way_goes_on(family, tmp_path):
    """The script of before makes a model without their LoRA, for which no state fits with or without an optimizer."""
    linears = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", *(f"{n}.weight" for n in LINEARS)]}
    checkpoint, losses, names = whole(tmp_path, fresh(family, **linears))
    said = {"target_modules": ["o_proj", *LINEARS], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    turned = lambda A, B: flipped(A, B, E) if len(A) == E * R else (A, B)  # noqa: E731 (shared experts have no E)
    rewrite(checkpoint, names, turned, peft_version=written_otherwise(family), **said)
    with pytest.raises(AdapterError, match="linears that this model has none on.*takes down_proj, gate_proj, up_proj"):
        train(trainer_of(fresh(family, **said), tmp_path / "refused"), checkpoint)
    torch.manual_seed(1)
    model = PeftModel.from_pretrained(zoo.tiny_model(family), checkpoint, is_trainable=True)
    assert_goes_on(checkpoint, losses, model)


@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP"])
def test_engines_with_files_of_their_own_are_refused(engine, tmp_path):
    checkpoint, _, names = whole(tmp_path, fresh())
    turn_round(checkpoint, names)
    trainer = trainer_of(fresh(), tmp_path / "whole")
    setattr(trainer, f"is_{engine.lower()}_enabled", True)
    shutil.rmtree(tmp_path / "whole" / f"checkpoint-{STEPS}")
    with pytest.raises(
        AdapterError, match=f"{engine} loads weights and optimizer state from files of its own.*Start a"
    ):
        trainer.train(resume_from_checkpoint=True)  # the last one


def test_factors_trained_unlike_each_other_cannot_change_places(tmp_path):
    def unlike(model):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if factor in name], "lr": rate}
            for factor, rate in ((".lora_A.", 1e-2), (".lora_B.", 4e-2))
        ]
        return {"optimizers": (torch.optim.AdamW(groups), None)}

    model = fresh()
    checkpoint, _, names = whole(tmp_path, model, **unlike(model))
    turn_round(checkpoint, sorted(names, key=lambda name: ".lora_B." in name))
    model = fresh()
    with pytest.raises(AdapterError, match="settings of their own.*change places.*Start a new run"):
        train(trainer_of(model, tmp_path / "resumed", **unlike(model)), checkpoint)


def test_a_checkpoint_of_single_experts_is_refused_with_its_state(tmp_path):
    model = fresh()
    checkpoint, _, _ = whole(tmp_path, model)
    single = convert_adapter(checkpoint, tmp_path / "single", to="per-expert", model=model.config.to_dict()).out
    for file in single.iterdir():
        shutil.copy(file, checkpoint / file.name)
    with pytest.raises(AdapterError, match="LoRA on every expert by itself.*optimizer.pt cannot.*Start a new run"):
        train(trainer_of(fresh(), tmp_path / "resumed"), checkpoint)


def loaded_by_hand(checkpoint, sizes=None):
    torch.manual_seed(1)
    model = PeftModel.from_pretrained(zoo.tiny_model(FAMILY, **(sizes or {})), checkpoint, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained}, {"params": []}], fused=True)  # in Trainer's groups
    ids = zoo.token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    return optimizer


def test_state_loaded_by_hand_is_an_error_at_the_first_step(tmp_path):
    checkpoint, _, names = whole(tmp_path, fresh())
    turn_round(checkpoint, names)
    optimizer = loaded_by_hand(checkpoint)
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt"))
    for _ in range(2):
        with pytest.raises(LayoutError, match="converted in memory.*Trainer.train"):
            optimizer.step()


def test_state_of_square_factors_loaded_by_hand_is_told_of(tmp_path):
    checkpoint, _, names = whole(tmp_path, fresh(FAMILY, SQUARE, **DOWN))
    turn_round(checkpoint, names)
    with told_by_its_writer():
        optimizer = loaded_by_hand(checkpoint, SQUARE)
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt"))
    with pytest.warns(CompatWarning, match="its moments belong to other entries"):
        optimizer.step()
    optimizer.step()  # once


def test_a_converted_adapter_trains_without_a_word_and_is_then_forgotten(tmp_path):
    checkpoint, _, names = whole(tmp_path, fresh())
    turn_round(checkpoint, names)
    optimizer = loaded_by_hand(checkpoint)
    assert resuming._converted
    optimizer.step()
    optimizer.step()
    assert not resuming._converted


def saved_state(folder, sizes=None, **lora):
    """What accelerate loads of a trained model, and how; its checkpoint is in the folder."""
    model = fresh(sizes=sizes, **lora)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    ids = zoo.token_ids()
    for _ in range(2):
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
    accelerator.save_state(folder)
    return model, accelerator


def turn_state(folder, metadata=None):
    """Lays the experts' LoRA of accelerate's checkpoint out the other way."""
    file = folder / "model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    for name in [name for name in tensors if "experts" in name and ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        tensors[name], tensors[other] = (factor.contiguous() for factor in flipped(tensors[name], tensors[other], E))
    save_file(tensors, file, {"format": "pt"} | (metadata or {}))


@contextmanager
def untouched(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_accelerates_own_checkpoint_of_another_layout_is_refused_before_anything_is_loaded(tmp_path):
    model, accelerator = saved_state(tmp_path)
    accelerator.load_state(tmp_path)  # its own goes on
    turn_state(tmp_path)
    with untouched(model), pytest.raises(AdapterError, match="model.safetensors has .*lora_A.*not converted.*save_pre"):
        accelerator.load_state(tmp_path)


def test_accelerates_checkpoint_of_square_factors_says_how_it_is_laid_out(tmp_path):
    model, accelerator = saved_state(tmp_path, SQUARE, **DOWN)
    accelerator.load_state(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    here = next(iter(json.loads(metadata["peft_moe_compat.layout"]).values()))[0].split()[1]
    there = {"linear": "reversed", "reversed": "linear"}[here]
    mark = {"peft_moe_compat.layout": metadata["peft_moe_compat.layout"].replace(here, there)}
    turn_state(tmp_path, mark)
    with untouched(model), pytest.raises(AdapterError, match=f"says of .*down_proj {there}.*not converted.*save_pretr"):
        accelerator.load_state(tmp_path)
    peft_moe_compat.deactivate()
    accelerator.load_state(tmp_path)  # as stock accelerate does, without a word


@pytest.mark.parametrize("safe", [True, False])
def test_accelerates_checkpoint_that_says_nothing_is_refused_where_only_square_factors_are_in_it(tmp_path, safe):
    peft_moe_compat.deactivate()
    model, accelerator = saved_state(tmp_path, SQUARE, **DOWN)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
        accelerator.save_state(tmp_path, safe_serialization=False)
    peft_moe_compat.activate()
    with untouched(model), pytest.raises(AmbiguousAdapterError, match="does not say .* square.*written_by"):
        accelerator.load_state(tmp_path)
    other = f"peft=={written_otherwise()},transformers=={transformers.__version__}"
    with untouched(model), written_by(other), pytest.raises(AdapterError, match="as written_by says.*not converted"):
        accelerator.load_state(tmp_path)
    with untouched(model), written_by(HERE):
        accelerator.load_state(tmp_path)
    wide, accelerator = saved_state(tmp_path / "wide", SQUARE)  # of which gate_up tells
    save_file(load_file(tmp_path / "wide" / "model.safetensors"), tmp_path / "wide" / "model.safetensors")
    with untouched(wide):
        accelerator.load_state(tmp_path / "wide")


IMPORTS = """
import json, sys
import peft_moe_compat
{before}
peft_moe_compat.activate()
lazy = "transformers.trainer" in sys.modules
from transformers import Trainer
names = ("train", "_load_optimizer_and_scheduler")
modules = [vars(Trainer)[name].__globals__["__name__"] for name in names]
peft_moe_compat.deactivate()
after = [vars(Trainer)[name].__globals__["__name__"] for name in names]
peft_moe_compat.activate()
again = [vars(Trainer)[name].__globals__["__name__"] for name in names]
print("RESULT" + json.dumps([lazy, modules, after, again]))
"""


@pytest.mark.parametrize(
    ("before", "imported"), [("", False), ("from transformers import Trainer", True), ("import peft", False)]
)
def test_trainer_is_followed_whenever_it_is_imported_and_never_by_us(before, imported):
    ours, theirs = (["peft_moe_compat.patching.replacement"] * 2, ["transformers.trainer"] * 2)
    assert result_of(IMPORTS.format(before=before)) == [imported, ours, theirs, ours]


def test_a_trainer_that_somebody_else_patched_calls_theirs(monkeypatch):
    peft_moe_compat.deactivate()
    genuine = Trainer.train
    theirs = lambda self, *args, **kwargs: genuine(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(Trainer, "train", theirs)
    with peft_moe_compat.activate():
        assert Trainer.train is not theirs
    assert Trainer.train is theirs
