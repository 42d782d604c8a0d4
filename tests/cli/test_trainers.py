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
from pathlib import Path

import peft
import pytest
import yaml
from support import zoo
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


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "llamafactory"])
def test_each_leaves_dropout_to_peft(name, model):
    (value,) = {json.dumps(options(name, model[0])["lora_dropout"])} & {"0.0", '["0"]'}
    assert value


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
    assert " numbers on 8 layers of " in result.output  # two linears and two stacks in each of two
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 3, str(folder))
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert sorted(config["target_parameters"]) == sorted(names)
    result = run("init", folder, out, "--rank", 2)
    assert result.exit_code == 2
    assert "exists already" in result.output
    result = run("init", folder, tmp_path / "one", "--rank", 2, "--target-parameters", names[-1])
    assert result.exit_code == 0, result.output
    assert " numbers on 2 layers of " in result.output


@pytest.fixture
def trainable(tmp_path):
    """Folder of a tiny model with a tokenizer, and of a dataset of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", "<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "base")
    zoo.tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps({"text": f"a b c d {word}"}) + "\n" for word in "efgh")
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    return tmp_path / "base", tmp_path / "data"


def test_trl_trains_on_what_is_pasted_and_the_report_says_so(trainable, tmp_path):
    """The command line of TRL, in processes that nothing but the environment's switch tells of the package."""
    pytest.importorskip("trl", reason="TRL is installed beside the newest pair alone")
    model, data = trainable
    site = tmp_path / "site"
    site.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("peft_moe_compat.cli.switch._folder", lambda: site)
        assert run("enable").exit_code == 0
    # As the start of Python does with every .pth file of a site-packages.
    (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})\n")
    rest = {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    config = tmp_path / "sft.yaml"
    text = run("targets", model, "--for", "trl").stdout
    config.write_text(text + "".join(f"{name}: {json.dumps(value)}\n" for name, value in rest.items()))
    result = subprocess.run(
        [Path(sys.executable).with_name("trl"), "sft", "--config", config],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path]), "PEFT_MOE_COMPAT_REPORT": "1", "COLUMNS": "300"},
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "peft_moe_compat active" in result.stderr
    assert result.stderr.count("grouped_mm") >= 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(run("targets", model).stdout.split())
