"""The stages of the demo, each the whole work of one process: `python -m peft_moe_compat.cli.demo_stages <stage> ...`.

What a stage has to say goes to standard output as lines of JSON behind `MARK`; everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PeftMoeCompatError

__all__ = ["LEGS", "MARK", "MODELS", "DemoError", "Job", "Settings", "main"]

MODELS = {"qwen3_moe": "Qwen3-MoE", "gpt_oss": "gpt-oss"}
LEGS = {"stock": "stock PEFT", "ours": "peft_moe_compat"}
VOCABULARY = 256  # bytes
SEQUENCE = 64  # bytes per training example
SEED = 0
MARK = "demo-event "  # begins the lines a stage writes for the process that shows them


class DemoError(PeftMoeCompatError):
    """The demo cannot run as asked, or one of its stages failed."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. The experts' intermediate size is the hidden size; a token goes to up to four experts.

    Attributes:
        tokens: Per training step, a multiple of the 64 bytes of an example.
        tolerance: The most by which the losses of the two runs, and the logits of a reloaded adapter, may differ.
    """

    device: str = "cpu"
    steps: int = 60
    prepare_steps: int = 60
    hidden_size: int = 256
    experts: int = 64
    layers: int = 2
    rank: int = 8
    tokens: int = 512
    models: tuple[str, ...] = tuple(MODELS)
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            raise DemoError(f"--device {self.device!r} is none of 'cpu', 'cuda' and 'cuda:N'.")
        if unknown := [name for name in self.models if name not in MODELS]:
            raise DemoError(f"--models {unknown[0]!r} is none of {', '.join(MODELS)}.")
        units = {"tokens": SEQUENCE, "hidden_size": 8}
        units |= dict.fromkeys(("steps", "prepare_steps", "experts", "layers", "rank"), 1)
        for name, unit in units.items():
            value = getattr(self, name)
            if value < unit or value % unit:
                raise DemoError(f"--{name.replace('_', '-')} {value} is not a positive multiple of {unit}.")


@dataclass(frozen=True)
class Job:
    """What a stage works on; `folder` holds what the model's stages leave for each other."""

    settings: Settings
    model: str
    folder: Path

    @property
    def device(self) -> str:
        """Device type, "cpu" or "cuda": a stage's process sees the one GPU it should use."""
        return self.settings.device.partition(":")[0]


def _emit(**event: Any) -> None:
    print(MARK + json.dumps(event), file=sys.__stdout__, flush=True)


def _text(pattern: str) -> bytes:
    """The standard library's source files of a pattern, joined in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern))
    text = b"\n".join(file.read_bytes() for file in files)
    if len(text) <= SEQUENCE:
        raise DemoError(f"This Python keeps no source files {pattern!r} of its standard library on disk to train on.")
    return text


def _windows(text: bytes, count: int) -> Any:
    """`count` random excerpts of a text as token ids, "count SEQUENCE", the same at every call."""
    import torch

    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    starts = torch.randint(len(ids) - SEQUENCE, (count,), generator=torch.Generator().manual_seed(SEED))
    return torch.stack([ids[start : start + SEQUENCE] for start in starts.tolist()]).long()


def _base_model(job: Job, prepared: bool = True) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    s = job.settings
    experts = {
        "qwen3_moe": ("num_experts", "moe_intermediate_size"),
        "gpt_oss": ("num_local_experts", "intermediate_size"),
    }
    num_experts, intermediate_size = experts[job.model]
    sizes = {num_experts: s.experts, intermediate_size: s.hidden_size, "num_experts_per_tok": min(4, s.experts)}
    config = AutoConfig.for_model(
        job.model,
        vocab_size=VOCABULARY,
        hidden_size=s.hidden_size,
        num_hidden_layers=s.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=s.hidden_size // 4,
        use_cache=False,
        **sizes,
    )
    set_seed(SEED)
    model = AutoModelForCausalLM.from_config(config).float()
    if prepared:
        model.load_state_dict(torch.load(job.folder / "base.pt", weights_only=True))
    if job.device == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda was asked for, but torch.cuda.is_available() is False.")
    return model.to(job.device)


def _train(job: Job, model: Any, text: bytes, steps: int, learning_rate: float) -> dict[str, Any]:
    """`steps` steps of transformers' Trainer, reported as they go: losses and seconds per step, digest, peak_bytes."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().numpy().tobytes())
    losses: list[float] = []
    seconds: list[float] = []

    class ByteTrainer(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            digest.update(inputs["input_ids"].cpu().numpy().tobytes())
            loss = super().training_step(model, inputs, *args, **kwargs)
            losses.append(loss.item())  # not from the logs, which some transformers releases round to four digits
            return loss

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            if job.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)
            _emit(step=len(losses), loss=losses[-1])

    batch = job.settings.tokens // SEQUENCE
    arguments = TrainingArguments(
        output_dir=str(job.folder / "trainer"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=learning_rate,
        optim="adamw_torch",
        # Rounding may send a token to another expert in one of two runs. With the usual 1e-8, Adam would turn that
        # expert's first small gradient into a step of full size, and the runs would part.
        adam_epsilon=1e-4,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=job.device == "cpu",
        seed=SEED,
    )
    data = [{"input_ids": window, "labels": window} for window in _windows(text, batch * steps)]
    trainer = ByteTrainer(model=model, args=arguments, train_dataset=data, callbacks=[Steps()])
    trainer.remove_callback(PrinterCallback)
    peak = _peak_above_now(job.device)
    trainer.train()
    return {"losses": losses, "step_seconds": seconds, "digest": digest.hexdigest(), "peak_bytes": peak()}


def _peak_above_now(device: str) -> Callable[[], int | None]:
    """A function that tells the highest memory since, in bytes above what is in use now.

    Resident memory of the process on the CPU, which only Linux lets a process read and reset; tensors on a GPU.
    """
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - allocated
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the high-water mark, to what is resident now
    except OSError:
        return lambda: None
    resident = _status_bytes("VmRSS")
    return lambda: _status_bytes("VmHWM") - resident


def _status_bytes(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def _logits(job: Job, model: Any) -> Any:
    """Logits of a fixed batch, "batch SEQUENCE VOCABULARY", on the CPU."""
    import torch

    with torch.no_grad():
        ids = _windows(_text("encodings/*.py"), job.settings.tokens // SEQUENCE)
        return model.eval()(input_ids=ids.to(job.device)).logits.float().cpu()


def _prepare(job: Job) -> dict[str, Any]:
    """A base that has read some Python, so that routing and experts are not random. Kept as base.pt."""
    import torch

    from ..model.targets import expert_parameters

    model = _base_model(job, prepared=False)
    expert_parameters(model)  # refuses a model without fused experts before the work
    _train(job, model, _text("*.py"), job.settings.prepare_steps, learning_rate=2e-3)
    torch.save(model.state_dict(), job.folder / "base.pt")
    return {}


def _leg(job: Job, name: str) -> dict[str, Any]:
    """LoRA on the experts for the codec tables of `encodings`, which look like no other Python source."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from .. import activate
    from ..model.targets import expert_parameters
    from ..reporting import report

    if name == "ours":
        activate()  # the import alone would only warn where it cannot
    model = _base_model(job)
    r = job.settings.rank
    targets = expert_parameters(model)
    set_seed(SEED)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=targets))
    rows = [parameter for experts in report(model).rows for parameter in experts.parameters]
    training = _train(job, model, _text("encodings/*.py"), job.settings.steps, learning_rate=1e-2)
    torch.save(_logits(job, model), job.folder / f"{name}-logits.pt")
    model.save_pretrained(job.folder / name)
    paths, reasons = {row.path for row in rows}, {row.reason for row in rows if row.reason}
    return training | {"path": ", ".join(sorted(paths)), "reason": "; ".join(sorted(reasons))}


def _reload(job: Job) -> dict[str, float]:
    """Run -> largest difference of a logit between the run itself and its adapter reloaded here, by stock PEFT."""
    import torch
    from peft import PeftModel

    differences = {}
    for step, name in enumerate(LEGS, start=1):
        model = PeftModel.from_pretrained(_base_model(job), job.folder / name)
        before = torch.load(job.folder / f"{name}-logits.pt", weights_only=True)
        differences[name] = float((_logits(job, model) - before).abs().max())
        _emit(step=step)
    return differences


def main(stage: str, model: str, folder: str, settings: str) -> int:
    """The whole of a stage's process: its result, or a refusal of ours, goes out as the last event."""
    stages: dict[str, Callable[[Job], dict[str, Any]]] = {
        "prepare": _prepare,
        "stock": lambda job: _leg(job, "stock"),
        "ours": lambda job: _leg(job, "ours"),
        "reload": _reload,
    }
    options = json.loads(settings)
    job = Job(Settings(**options | {"models": tuple(options["models"])}), model, Path(folder))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = stages[stage](job)
    except PeftMoeCompatError as error:
        _emit(refused=str(error), kind=type(error).__name__)
        return 1
    _emit(result=result)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
