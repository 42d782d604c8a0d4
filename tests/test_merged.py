"""`verify_merged`: what `merge_and_unload` of the installed PEFT makes of an adapter, per experts module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from support import zoo
from typer.testing import CliRunner

from peft_moe_compat import AdapterError, convert_adapter, verify_merged
from peft_moe_compat.cli import main as cli

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = [family for family in zoo.FAMILIES if family in ("qwen3_moe", "gpt_oss", "nemotron_h")]


def saved(folder, family):
    """An adapter of a tiny model, and the model's config."""
    model = zoo.tiny_model(family)
    config = model.config.to_dict()
    zoo.peft_model(model).save_pretrained(folder)
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_nothing(tmp_path, family):
    config = saved(tmp_path / "adapter", family)
    done = []
    found = verify_merged(tmp_path / "adapter", model=config, progress=lambda now, total: done.append((now, total)))
    assert found.same, found.rows
    assert 0 < len(found.rows) == len(done) == done[-1][1]
    assert all(row.name.endswith("experts") for row in found.rows)


@pytest.mark.parametrize("family", FAMILIES[:1])
def test_a_merge_that_loses_the_update_is_seen(tmp_path, monkeypatch, family):
    config = saved(tmp_path / "adapter", family)
    monkeypatch.setattr(ParamWrapper, "merge", lambda self, *args, **kwargs: None)
    found = verify_merged(tmp_path / "adapter", model=config)
    assert not found.same
    assert found.worst > 1e-3


def test_the_command(tmp_path):
    config = saved(tmp_path / "adapter", FAMILIES[0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["verify", str(tmp_path / "adapter"), "--merged", "--model", str(tmp_path / "config.json")]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["same"] is True
    assert "the same" in CliRunner().invoke(cli.app, arguments).output
    assert CliRunner().invoke(cli.app, arguments[:3]).exit_code == 2  # without --model


def test_another_model_is_refused(tmp_path):
    config = saved(tmp_path / "adapter", FAMILIES[0])
    convert_adapter(tmp_path / "adapter", tmp_path / "same", to="peft", model=config)
    with pytest.raises(AdapterError, match="config is needed to build its experts"):
        verify_merged(tmp_path / "same")
    with pytest.raises(AdapterError, match="knows no model of type 'nobody'"):
        verify_merged(tmp_path / "same", model=config | {"model_type": "nobody"})


def test_a_config_that_transformers_refuses_is_a_sentence(tmp_path):
    config = saved(tmp_path / "adapter", FAMILIES[0])
    with pytest.raises(AdapterError, match="transformers makes no model of this"):
        verify_merged(tmp_path / "adapter", model=config | {"num_hidden_layers": "two"})


def test_the_tolerance_is_the_one_asked_for(tmp_path):
    config = saved(tmp_path / "adapter", FAMILIES[0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["verify", str(tmp_path / "adapter"), "--merged", "--model", str(tmp_path / "config.json"), "--json"]
    for more, tolerance in ([], 1e-5), (["--tolerance", "1e-12"], 1e-12):
        assert json.loads(CliRunner().invoke(cli.app, [*arguments, *more]).stdout)["tolerance"] == tolerance


def test_an_update_of_zero_is_merged_as_such(tmp_path):
    folder = shutil.copytree(FIXTURES / "peft/peft0170-tf4576/llama4", tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({n: t * 0 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    found = verify_merged(folder, model=folder / "base_config.json")
    assert found.same, found.rows
    assert found.worst == 0


def test_experts_whose_forward_takes_other_arguments_are_compared_by_weight():
    """llama4: stacks in every transformers, undecorated."""
    folder = FIXTURES / "peft/peft0170-tf4576/llama4"
    found = verify_merged(folder, model=folder / "base_config.json")
    assert found.same, found.rows
    assert {row.projection for row in found.rows} == {"weights"}
