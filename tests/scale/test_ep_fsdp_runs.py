"""Runs where experts are spread over ranks and FSDP2 shards them: optimizer, precision, offload, Trainer, merging.

The oracle is stock PEFT in one process, on the whole batch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import zoo
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import peft_moe_compat
from peft_moe_compat import ParallelismError

from . import models
from .ranks import run
from .sharded_models import CONFIG, SIZES, TOLERANCE, load, stock

LAYOUT = {"fsdp_size": 2, "ep_size": 2}
LARGER = {"fsdp_size": 4, "ep_size": 2}


def _adapted(folder, layout):
    base = load(f"{folder}/base", layout)
    return PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True)


def _adamw(model):
    """One group for each mesh, which one step of many tensors cannot span."""
    by_mesh = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return torch.optim.AdamW([{"params": found} for found in by_mesh.values()], lr=1e-2)


def _first_half(folder, layout):
    """Two of four steps, which are saved; in the third one rank is killed."""
    from transformers.distributed.checkpoint import save_optimizer_distributed

    model = _adapted(folder, layout)
    optimizer = _adamw(model)
    found = models.train(model, models.batches(4)[:2], optimizer=optimizer)
    model.save_pretrained(f"{folder}/half", is_main_process=dist.get_rank() == 0)
    save_optimizer_distributed(model, optimizer, f"{folder}/half optimizer")
    if dist.get_rank() == 0:
        torch.save({name: value for name, value in found.items() if name.endswith("loss")}, f"{folder}/losses.pt")
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    models.train(model, models.batches(4)[2:], optimizer=optimizer)


def _second_half(folder, layout):
    from transformers.distributed.checkpoint import load_optimizer_distributed

    model = PeftModel.from_pretrained(load(f"{folder}/base", layout), f"{folder}/half", is_trainable=True)
    optimizer = _adamw(model)
    load_optimizer_distributed(model, optimizer, f"{folder}/half optimizer")
    found = models.train(model, models.batches(4)[2:], optimizer=optimizer)
    return {f"{int(name[0]) + 2}.loss": value for name, value in found.items() if name.endswith("loss")}


def _trained(folder, layout):
    return models.train(_adapted(folder, layout), models.batches())


def _offloaded(folder, layout):
    from torch.distributed.fsdp import CPUOffloadPolicy

    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}  # pinning needs an accelerator
    with mock.patch("transformers.distributed.fsdp._get_fsdp_policy_kwargs", return_value=policy):
        return _trained(folder, layout | {"fsdp_cpu_offload": True})


def _accumulated(folder, layout):
    model = _adapted(folder, layout)

    @contextmanager
    def microbatch(last):
        model.set_requires_gradient_sync(last)
        yield

    return models.train(model, models.batches(), microbatch=microbatch, microbatches=2)


def _trainer(folder, output, base):
    """An adapter by Trainer, three steps of four rows each whatever the number of ranks."""
    model = PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    arguments = transformers.TrainingArguments(
        f"{folder}/{output}", max_steps=3, per_device_train_batch_size=models.BATCH // ranks, learning_rate=1e-2,
        max_grad_norm=0.5, save_strategy="no", report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for batch in models.batches() for row in batch]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(f"{folder}/{output}")
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def _by_trainer(folder, layout):
    return _trainer(folder, "by ranks", load(f"{folder}/base", layout))


def _by_accelerate(folder, layout):
    """Norms of clipped gradients, and losses; accelerate prepares the optimizer, and leaves the model as it is."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), _adapted(folder, layout)
    optimizer, found = accelerator.prepare(_adamw(model)), []
    for batch in models.batches():
        ids = batch.chunk(accelerator.num_processes)[accelerator.process_index]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found += [float(norm), float(models.mean_over_ranks(loss))]
    return found


def _logits(model):
    with torch.no_grad():
        return model(input_ids=models.batches()[0]).logits


def _live(folder, layout):
    model = _adapted(folder, layout).eval()
    found = {"logits": _logits(model)}
    found["updates"] = [reading.updates for reading in peft_moe_compat.ExpertReadings(model).read() if reading.updates]
    found["handed over"] = {name: tensor.clone() for name, tensor in peft_moe_compat.adapter_tensors(model, "sglang")}
    found["paths"] = {p.path for row in peft_moe_compat.report(model).rows for p in row.parameters}
    model.merge_adapter()
    found["merged"] = _logits(model)
    model.unmerge_adapter()
    found["unmerged"] = _logits(model)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a base model and an adapter on it."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    zoo.tiny_model("qwen3_moe", **SIZES["qwen3_moe"]).save_pretrained(folder / "base")
    with stock():
        model = get_peft_model(load(f"{folder}/base"), LoraConfig(**CONFIG))
        zoo.randomise(model)
        model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    with stock():
        return models.train(_adapted(folder, None), models.batches())


@pytest.mark.parametrize(("saved_on", "resumed_on"), [((2, LAYOUT), (4, LARGER)), ((4, LARGER), (2, LAYOUT))])
def test_resumes_with_its_optimizer_on_another_layout(folder, saved_on, resumed_on):
    with stock():
        model = _adapted(folder, None)
        expected = models.train(model, models.batches(4), optimizer=_adamw(model))
    with pytest.raises((ProcessExitedException, ProcessRaisedException), match=r"SIGKILL|[Cc]onnection"):
        run(saved_on[0], _first_half, str(folder), saved_on[1])
    before = torch.load(f"{folder}/losses.pt")
    losses = {name: value for name, value in expected.items() if name.endswith("loss")}
    for after in run(resumed_on[0], _second_half, str(folder), resumed_on[1]):
        zoo.assert_same(before | after, losses, 1e-4)


@pytest.mark.parametrize("how", [_offloaded, _accumulated])
def test_training_equals_one_process(folder, expected, how):
    for rank in run(2, how, str(folder), LAYOUT):
        zoo.assert_same(rank, expected, TOLERANCE)


def test_mixed_precision(folder, expected):
    """In bfloat16, but for the sums over ranks and the parameters."""
    for rank in run(2, _trained, str(folder), LAYOUT | {"fsdp_mixed_precision": True}):
        assert {tensor.dtype for name, tensor in rank.items() if not name.endswith("loss")} == {torch.float32}
        for name in ("0.loss", "1.loss", "2.loss"):
            assert rank[name].item() == pytest.approx(expected[name].item(), rel=1e-2)
            assert rank[name] != expected[name]


def test_trainer(folder):
    with stock():
        norms = _trainer(folder, "by one", load(f"{folder}/base"))
    for found in run(2, _by_trainer, str(folder), LAYOUT):
        assert found == pytest.approx(norms, rel=1e-3)
    files = (load_file(folder / name / "adapter_model.safetensors") for name in ("by ranks", "by one", "adapter"))
    found, expected, start = files
    zoo.assert_same({n: t - start[n] for n, t in found.items()}, {n: t - start[n] for n, t in expected.items()}, 1e-2)


def test_accelerate(folder):
    with stock():
        expected = _by_accelerate(folder, None)
    for found in run(2, _by_accelerate, str(folder), LAYOUT):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("ranks", "layout"), [(2, LAYOUT), (4, LARGER)])
def test_what_is_asked_of_a_live_model(folder, ranks, layout):
    with stock():
        model = _adapted(folder, None).eval()
        expected = _logits(model)
    whole = dict(peft_moe_compat.adapter_tensors(model, "sglang"))
    updates = [reading.updates for reading in peft_moe_compat.ExpertReadings(model).read() if reading.updates]
    found = run(ranks, _live, str(folder), layout)
    for rank in found:
        assert rank["paths"] == {"grouped_mm"}
        for name in ("logits", "merged", "unmerged"):
            zoo.assert_same({name: rank[name]}, {name: expected}, 1e-4)
        zoo.assert_same(rank["handed over"], whole, 0)
    for first, second, both in zip(found[0]["updates"], found[1]["updates"], updates, strict=True):
        assert (*first, *second) == pytest.approx(both, rel=1e-4)


def _torchrun(folder, where, script, timeout):
    """Of a script in a folder, on two ranks, with the base model as its argument."""
    Path(where, "train.py").write_text(script, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*torchrun, "train.py", str(folder / "base")],
        cwd=where, env={**os.environ, **paths}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def _merged_beside_tensor_parallelism(folder, layout):
    model = _adapted(folder, layout)
    with pytest.raises(ParallelismError, match=r"can't merge .*peft-moe-compat merge BASE ADAPTER OUT"):
        model.merge_adapter()


def test_a_merge_that_would_fail_halfway_is_refused(folder):
    run(4, _merged_beside_tensor_parallelism, str(folder), {"fsdp_size": 2, "ep_size": 2, "tp_size": 2})


@pytest.fixture(scope="module")
def recipe():
    page = Path(__file__).parents[2] / "docs" / "expert-parallel.md"
    (script,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return script


def test_the_recipe_of_the_documents_trains_on_two_ranks(folder, recipe, tmp_path):
    assert recipe.count("\n") < 40
    shared = "trainer.train()\nassert arguments.world_size == 2, 'every rank trains on the same batches'\n"
    done = _torchrun(folder, tmp_path, recipe.replace("trainer.train()\n", shared), 240)
    assert done.returncode == 0, done.stderr[-3000:]
    with stock():
        model = PeftModel.from_pretrained(load(f"{folder}/base"), tmp_path / "out")
    assert all(w.lora_B["default"].weight.count_nonzero() > 0 for w in zoo.wrappers(model))


KILLED = """
import signal
from transformers import TrainerCallback

class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

trainer.add_callback(Killed())
trainer.train()
"""


def test_a_killed_rank_ends_the_run(folder, recipe, tmp_path):
    done = _torchrun(folder, tmp_path, recipe.replace("trainer.train()\n", KILLED), 240)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
