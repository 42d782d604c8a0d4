"""`peft-moe-compat targets` and `init`: what they print is what the trainers take."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise

import peft
import pytest
import yaml
from support import zoo
from support.switched_on import switch_on
from typer.testing import CliRunner

import peft_moe_compat
from peft_moe_compat.cli import main as cli
from peft_moe_compat.cli.trainers import TRAINERS


@pytest.fixture
def model(tmp_path):
    """Folder of a tiny model, and the names of its experts."""
    made = zoo.tiny_model(zoo.FAMILIES[0])
    made.save_pretrained(tmp_path / "base")
    return tmp_path / "base", peft_moe_compat.expert_parameters(made)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def without_comments(text):
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def options(name, model):
    """What is to be pasted, read as the trainer reads it: option -> value."""
    result = run("targets", model, "--for", name)
    assert result.exit_code == 0, result.output
    text = without_comments(result.stdout)
    if name == "peft":
        call = ast.parse(text.strip(), mode="eval").body
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    if name == "ms-swift":
        words = shlex.split(text)
        starts = [at for at, word in enumerate(words) if word.startswith("--")] + [len(words)]
        return {words[start].removeprefix("--"): words[start + 1 : end] for start, end in pairwise(starts)}
    return yaml.safe_load(text)


def test_names_alone_are_one_a_line(model):
    folder, names = model
    for path in (folder, folder / "config.json"):
        assert run("targets", path).stdout.splitlines() == names


@pytest.mark.parametrize("name", TRAINERS)
def test_each_is_read_back_with_every_name(name, model):
    folder, names = model
    read = options(name, folder)
    asked = [value for option, value in read.items() if option.endswith("target_parameters")]
    assert asked == ([] if name == "llamafactory" else [names])
    assert set(read) <= set(TRAINERS[name].options)


def test_a_command_to_be_pasted_names_the_model_as_a_shell_reads_it(model, tmp_path):
    folder = model[0].rename(tmp_path / "it's a $base")
    lines = run("targets", folder, "--for", "llamafactory").stdout.splitlines()
    line = next(line for line in lines if " init " in line)
    assert shlex.split(line.removeprefix("#"))[:4] == ["peft-moe-compat", "init", str(folder), "FRESH"]


def known_options(name):
    """Every option of an installed trainer."""
    if name == "peft":
        return {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if name == "trl":
        reason = "TRL is installed beside the newest pair alone"
        config = pytest.importorskip("trl", reason=reason).ModelConfig
        return {field.name for field in dataclasses.fields(config)}
    if name == "axolotl":
        reason = "Axolotl pins versions of its own"
        schema = pytest.importorskip("axolotl.utils.schemas.peft", reason=reason).LoraConfig
        return set(schema.model_fields)
    if name == "ms-swift":
        reason = "ms-swift pins versions of its own"
        arguments = pytest.importorskip("swift.arguments.tuner_args", reason=reason).TunerArguments
        return {field.name for field in dataclasses.fields(arguments)} | {"tuner_type"}
    hparams = pytest.importorskip("llamafactory.hparams", reason="LLaMA-Factory pins versions of its own")
    classes = (hparams.ModelArguments, hparams.FinetuningArguments)
    return {field.name for cls in classes for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_options_are_the_trainers_own(name):
    assert set(TRAINERS[name].options) <= known_options(name)


def test_what_cannot_be_is_said(model, tmp_path):
    folder, _ = model
    result = run("targets", folder, "--for", "nobody")
    assert result.exit_code == 2
    assert "--for is 'nobody'; one of peft, trl, axolotl, ms-swift, llamafactory was expected" in result.output
    (tmp_path / "dense.json").write_text('{"model_type": "llama"}')
    result = run("targets", tmp_path / "dense.json")
    assert result.exit_code == 2
    assert "describes no model with routed experts" in result.output
    result = run("init", tmp_path / "dense.json", tmp_path / "out", "--rank", 2)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_init_writes_what_it_says(model, tmp_path):
    folder, names = model
    out = tmp_path / "fresh"
    result = run("init", folder, out, "--rank", 2, "--alpha", 3, "--target-modules", "q_proj, v_proj", "--seed", 7)
    assert result.exit_code == 0, result.output
    assert f"{out}: " in result.output
    assert " numbers on 8 weights of " in result.output  # two linears and two stacks in each of two
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 3, str(folder))
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert sorted(config["target_parameters"]) == sorted(names)
    result = run("init", folder, out, "--rank", 2)
    assert result.exit_code == 2
    assert "exists already" in result.output
    result = run("init", folder, tmp_path / "one", "--rank", 2, "--target-parameters", names[-1])
    assert result.exit_code == 0, result.output
    assert " numbers on 2 weights of " in result.output


@pytest.fixture
def trainable(tmp_path):
    """Folder of a tiny model with a tokenizer; files of eight rows beside it, as each trainer reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", "<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "base")
    zoo.tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    rows = {
        "text": [{"text": f"a b c d {word}"} for word in "efgh" * 2],
        "alpaca": [{"instruction": f"a b {word}", "input": "", "output": f"c d {word}"} for word in "efgh" * 2],
        "messages": [
            {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": f"c {word}"}]}
            for word in "efgh" * 2
        ],
    }
    for name, content in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(json.dumps(content))
    (tmp_path / "alpaca" / "dataset_info.json").write_text('{"rows": {"file_name": "train.json"}}')
    return tmp_path


def started(name, folder):
    """The command that trains for two steps, of a trainer that is installed."""
    base, out = folder / "base", folder / "out"
    pasted = run("targets", base, "--for", name).stdout.replace("FRESH", str(folder / "fresh"))
    steps = {"max_steps": 2, "output_dir": str(out)}
    # fmt: off
    of = {
        "trl": {"model_name_or_path": str(base), "dataset_name": str(folder / "text"), "use_cpu": True, "bf16": False},
        "axolotl": {
            "base_model": str(base),
            "datasets": [{"path": str(folder / "alpaca" / "train.json"), "ds_type": "json", "type": "alpaca"}],
            "lora_r": 4, "lora_alpha": 8, "sequence_len": 32, "micro_batch_size": 2, "num_epochs": 1,
            "optimizer": "adamw_torch", "learning_rate": 0.01, "bf16": False, "tf32": False, "save_strategy": "no",
        },
        "llamafactory": {
            "model_name_or_path": str(base), "stage": "sft", "do_train": True, "dataset": "rows",
            "dataset_dir": str(folder / "alpaca"), "template": "empty", "use_cpu": True, "report_to": "none",
        },
        "ms-swift": {
            "model": base, "model_type": "qwen3_moe", "template": "dummy", "torch_dtype": "float32",
            "dataset": folder / "messages" / "train.json", "split_dataset_ratio": 0, "max_length": 32,
            "use_cpu": "true", "use_hf": "true", "report_to": "none",
        },
    }[name] | steps
    # fmt: on
    if name == "ms-swift":
        words = [word for option, value in of.items() for word in (f"--{option}", str(value))]
        call = "from swift.cli.main import cli_main; cli_main()"
        return [sys.executable, "-c", call, "sft", *shlex.split(without_comments(pasted)), *words]
    file = folder / "train.yaml"
    file.write_text(pasted + "".join(f"{option}: {json.dumps(value)}\n" for option, value in of.items()))
    if name == "llamafactory":
        assert run("init", base, folder / "fresh", "--rank", 4, "--target-modules", "q_proj").exit_code == 0
        return [sys.executable, "-c", "from llamafactory.cli import main; main()", "train", file]
    if name == "axolotl":
        return [sys.executable, "-m", "axolotl.cli.train", file]
    return [sys.executable, "-c", "from trl.cli import main; main()", "sft", "--config", file]


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "peft"])
def test_the_trainer_itself_runs_on_what_is_pasted_and_the_report_says_so(name, trainable, monkeypatch):
    """From its command line, in processes that nothing but the environment's switch tells of the package.

    Also that `lora_dropout` may stay at what TRL and ms-swift have by default.
    """
    known_options(name)  # which skips where it is not installed
    site = trainable / "site"
    switch_on(site, monkeypatch)
    if name == "llamafactory":  # which imports it, has no use for it with text, and gets one for CUDA builds of torch
        (site / "torchaudio.py").touch()
    told = {"PYTHONPATH": os.pathsep.join([str(site), *sys.path]), "PEFT_MOE_COMPAT_REPORT": "1", "COLUMNS": "300"}
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    result = subprocess.run(
        started(name, trainable),
        capture_output=True,
        text=True,
        env=os.environ | told | quiet,
        cwd=trainable,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    said = result.stdout + result.stderr
    assert said.count("peft_moe_compat active") == 1
    assert len([line for line in said.splitlines() if "experts" in line and "grouped_mm" in line]) == 2
    saved = [json.loads(path.read_text()) for path in (trainable / "out").rglob("adapter_config.json")]
    names = run("targets", trainable / "base").stdout.split()
    assert saved
    assert all(sorted(config["target_parameters"]) == sorted(names) for config in saved)
