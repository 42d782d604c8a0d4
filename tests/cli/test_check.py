"""`peft-moe-compat check`, and that the command line stays light."""

import json
import subprocess
import sys

import pytest
import torch
from packaging.version import Version
from typer.testing import CliRunner

from peft_moe_compat import PatchConflictError, UnsupportedPeftError, activate, deactivate, is_active, releases
from peft_moe_compat.cli import main as cli
from peft_moe_compat.forward import fused, grouped_mm
from peft_moe_compat.patching import activation as patch


@pytest.fixture(autouse=True)
def _activation_left_as_found():
    was_active = is_active()
    yield
    (activate if was_active else deactivate)()


@pytest.fixture
def check():
    """Runs `check` with some arguments; wide, so that no sentence is folded."""
    return lambda *arguments: CliRunner().invoke(cli.app, ["check", *arguments], env={"COLUMNS": "400"})


def failing(error):
    def function(*_args, **_kwargs):
        raise error

    return function


def test_check_shows_versions_rule_probe_and_backend(check):
    result = check()
    assert result.exit_code == 0, result.output
    for version in releases.installed_versions("torch", "peft", "transformers").values():
        assert version in result.output
    assert str(activate().rule) in result.output
    assert "the installed ParamWrapper follows this rule" in result.output
    assert "backend, cpu" in result.output


def test_json_says_the_same_to_programs(check):
    result = check("--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    rule = activate().rule
    assert document["ok"] is True
    assert document["reason"] == ""
    assert document["versions"].items() >= releases.installed_versions("torch", "peft", "transformers").items()
    assert document["rule"] == {
        "since": str(rule.since),
        "axis_plain": rule.axis_plain,
        "axis_transposed": rule.axis_transposed,
        "reads_swap_flag": rule.reads_swap_flag,
    }
    assert document["backends"]["cpu"] in ("torch", "loop")
    assert document["experts_registry"] is bool(document["taken"])


@pytest.mark.parametrize(
    "error", [UnsupportedPeftError("measured [otherwise]"), PatchConflictError("patched by a_rival")]
)
def test_what_keeps_the_package_from_working_is_the_reason(check, monkeypatch, error):
    monkeypatch.setattr(patch, "activate", failing(error))
    result = check()
    assert result.exit_code == 1
    assert f"unusable: {error}" in result.output
    result = check("--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["ok"], document["reason"], document["rule"]) == (False, str(error), None)


def test_a_rival_patch_is_named(check, monkeypatch):
    from peft.tuners.lora.layer import ParamWrapper

    deactivate()
    monkeypatch.setattr(ParamWrapper, "forward", lambda self, x: x)
    result = check()
    assert result.exit_code == 1
    assert __name__ in result.output


def test_a_peft_that_does_not_import_is_the_reason_and_its_remedy_is_shown(check, monkeypatch):
    pair = {"peft": "0.17.1", "transformers": "5.0.0", "torch": torch.__version__}
    monkeypatch.setattr(releases, "installed_versions", lambda *names: {n: pair.get(n, "not installed") for n in names})
    monkeypatch.setitem(sys.modules, "peft", None)
    result = check()
    assert result.exit_code == 1
    assert "PEFT 0.17.1 does not import beside transformers 5.0.0" in result.output
    assert "install peft>=0.18 or transformers<5" in result.output


def test_what_the_installed_trainers_need_is_said(check, monkeypatch):
    versions = releases.installed_versions("torch", "peft", "transformers") | {"axolotl": "0.19.0", "ms-swift": "4.6.0"}
    monkeypatch.setattr(releases, "installed_versions", lambda *n: {m: versions.get(m, "not installed") for m in n})
    document = json.loads(check("--json").stdout)
    assert list(document["others"]) == ["axolotl", "ms-swift"]
    output = check().output
    assert all(needs in output for needs in document["others"].values())
    assert "plugins: [peft_moe_compat.integrations.axolotl.PeftMoeCompatPlugin]" in output
    assert "liger" not in output


def test_what_is_not_installed_is_the_reason(check, monkeypatch):
    monkeypatch.setattr(releases, "installed_versions", lambda *names: dict.fromkeys(names, "not installed"))
    result = check()
    assert result.exit_code == 1
    assert "torch, peft, transformers is needed but not installed" in result.output


def test_issues_that_concern_some_uses_only_are_shown_and_do_no_harm(check, monkeypatch):
    issue = releases.KNOWN_ISSUES[1]
    monkeypatch.setattr(releases, "known_issues", lambda peft, transformers: [issue])
    result = check()
    assert result.exit_code == 0
    assert issue.symptom in result.output
    assert issue.remedy in result.output
    document = json.loads(check("--json").stdout)
    assert [(found["symptom"], found["remedy"]) for found in document["known_issues"]] == [
        (issue.symptom, issue.remedy)
    ]


def test_no_known_issue_is_said_too(check, monkeypatch):
    monkeypatch.setattr(releases, "known_issues", lambda peft, transformers: [])
    assert "No issue is known" in check().output


def test_what_is_newer_than_any_tested_release_is_said(check, monkeypatch):
    """Of this pair, were it newer: what is installed stays as it is."""
    versions = releases.installed_versions("torch", "peft", "transformers") | {"peft": "99.1.0"}
    monkeypatch.setattr(
        releases, "installed_versions", lambda *names: {n: versions.get(n, "not installed") for n in names}
    )
    result = check()
    assert result.exit_code == 0, result.output
    assert f"99.1.0, newer than any tested release ({releases.NEWEST_TESTED})" in result.output
    assert "may still hold: " in result.output
    document = json.loads(check("--json").stdout)
    assert document["untested"] == {"peft": str(releases.NEWEST_TESTED)}
    certain = {issue["code"]: issue["certain"] for issue in document["known_issues"]}
    assert certain["parametrised_accumulates"] is False


def test_switched_off_by_the_environment_it_stays_off(check, monkeypatch):
    deactivate()
    monkeypatch.setenv("PEFT_MOE_COMPAT", "0")
    result = check()
    assert result.exit_code == 0
    assert "switched off by PEFT_MOE_COMPAT=0" in result.output
    assert not is_active()


def test_it_says_where_enable_has_been(check, monkeypatch):
    assert "works: active on import" in check().output
    assert json.loads(check("--json").stdout)["enabled"] is False
    monkeypatch.setattr("peft_moe_compat.cli.check.installed", lambda: True)
    assert "works: active in every process that imports PEFT (enable)" in check().output


def test_without_anexperts_registry_it_says_whose_forward_runs(check, monkeypatch):
    activate()
    monkeypatch.setattr("peft_moe_compat.patching.forward.experts_registry", lambda: None)
    result = check()
    assert result.exit_code == 0
    assert "most experts run in PEFT's own forward" in result.output


def test_a_development_build_with_another_rule_is_said(check, monkeypatch):
    rule = activate().rule
    newer = releases.LayoutRule(Version("9.9"), rule.axis_plain, rule.axis_transposed, not rule.reads_swap_flag)
    monkeypatch.setattr(releases, "release_for", lambda version: newer)
    assert "this development build follows this rule, not yet that of 9.9" in check().output


def test_every_cuda_device_gets_its_backend(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index else (7, 5))
    for module, answer in ((fused, "_unsupported"), (grouped_mm, "_serves")):  # these devices come and go
        monkeypatch.setattr(module, answer, getattr(module, answer).__wrapped__)
    backends = json.loads(check("--json").stdout)["backends"]
    assert backends["cuda:0"] == "loop"
    assert backends["cuda:1"] in ("triton", backends["cpu"])  # triton where it is installed


def test_rocm_is_refused_by_name(monkeypatch):
    """Whose triton takes NVIDIA's assembly without an error, and computes something else."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert fused._unsupported.__wrapped__(torch.device("cuda:0")).code == "rocm"


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from peft_moe_compat.cli.main import app\n"
        "for command in ([], ['check'], ['demo']):\n"
        "    result = CliRunner().invoke(app, [*command, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "print(sorted({'torch', 'peft', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
