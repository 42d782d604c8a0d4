"""A worker killed in the middle of training goes on from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

import peft_moe_compat

from . import models
from .ranks import run

STEPS, SAVED_EVERY, KILLED_AFTER = 8, 2, 5


def _model(family: str, stored: str) -> Any:
    if not stored:
        return models.lora_model(family)
    from .quantised_models import lora_model  # needs bitsandbytes and torchao, as no other test here does

    return lora_model(stored)


def _train(folder: str, family: str, stored: str = "", kill: bool = False) -> None:
    """The training script: resumes where there is a checkpoint; else it may kill its last worker on the way."""
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(Dataset):
        def __init__(self) -> None:
            self.ids = torch.cat(models.batches(STEPS))

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": self.ids[index], "labels": self.ids[index]}

    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = int(os.environ.get("RANK", "0")) == processes - 1
            if kill and last and not resumed and state.global_step == KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

    calls, model = models.Calls(), _model(family, stored)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    resumed = any(Path(folder).glob("checkpoint-*"))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=models.BATCH // processes,
        max_steps=STEPS,
        save_steps=SAVED_EVERY,
        logging_steps=1,
        learning_rate=1e-2,
        seed=7,
        use_cpu=True,
        report_to=[],
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Killed()])
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_model(f"{folder}/final")
    if trainer.is_world_process_zero():
        paths = {p.path for row in peft_moe_compat.report(model).rows for p in row.parameters}
        found = {"log": trainer.state.log_history, "calls": calls.taken(), "paths": sorted(paths), "resumed": resumed}
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")


def _train_and_be_killed(folder: str, family: str, stored: str) -> None:
    if dist.get_world_size() == 1:  # plain training, without a group
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    _train(folder, family, stored, kill=True)


@pytest.fixture(autouse=True)
def _uncounted():
    yield
    peft_moe_compat.deactivate()


@pytest.mark.parametrize(("family", "processes"), [("qwen3_moe", 1), ("gpt_oss", 1), ("qwen3_moe", 2)])
def test_resumes_after_a_kill(tmp_path, family, processes):
    check(tmp_path, family, processes)


@pytest.mark.parametrize("stored", ["bnb nf4", "torchao Int8Tensor", "fp8 (fine-grained)"])
def test_resumes_after_a_kill_over_quantised_experts(tmp_path, stored):
    check(tmp_path, "qwen3_moe", 1, stored)


def check(tmp_path, family, processes, stored=""):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _train(str(whole), family, stored)
    with pytest.raises(ProcessExitedException) as ended:
        run(processes, _train_and_be_killed, str(broken), family, stored)
    assert ended.value.signal_name == "SIGKILL"
    assert ended.value.error_index == processes - 1
    assert not (broken / "found.json").exists()
    if processes == 1:
        assert sorted(p.name for p in broken.iterdir()) == ["checkpoint-2", "checkpoint-4"]
        _train(str(broken), family, stored)
    else:
        run(processes, _train, str(broken), family, stored)

    found, expected = (json.loads((f / "found.json").read_text(encoding="utf-8")) for f in (broken, whole))
    first = KILLED_AFTER // SAVED_EVERY * SAVED_EVERY
    assert (found["resumed"], expected["resumed"]) == (True, False)
    assert found["paths"] == expected["paths"] == ["grouped_mm"]
    assert (found["calls"], expected["calls"]) == (models.LAYERS * (STEPS - first), models.LAYERS * STEPS)
    losses, uninterrupted = ({e["step"]: e["loss"] for e in f["log"] if "loss" in e} for f in (found, expected))
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(uninterrupted, rel=1e-5)
    before, after, final = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (broken / f"checkpoint-{first}", broken / "final", whole / "final")
    )
    assert after.keys() == final.keys()
    for name, tensor in final.items():
        scale = tensor.abs().max()
        assert (after[name] - tensor).abs().max() <= 1e-4 * scale, name
        assert (before[name] - tensor).abs().max() >= 1e-2 * scale, f"{name} did not train after the checkpoint"
