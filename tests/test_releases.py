"""The release table itself: the one test file that may name PEFT versions."""

from __future__ import annotations

import dataclasses

import pytest
from packaging.version import Version

from peft_moe_compat import UnsupportedPeftError
from peft_moe_compat.model.probe import installed_rule, measure_rule
from peft_moe_compat.releases import (
    KNOWN_ISSUES,
    NEWEST_TESTED,
    NEWEST_TRANSFORMERS,
    RULES,
    installed_versions,
    known_issues,
    newer_than_tested,
    parse_version,
    release_for,
    verified_rule,
)

# version -> (stored axis lora_A spans: is_transposed False, True; obeys the swap flag)
TABLE = {
    "0.17.0": (1, 1, False),
    "0.17.1": (1, 1, False),
    "0.18.0": (1, 1, False),
    "0.18.1": (1, 1, False),
    "0.18.2.dev0@0123abc": (1, 1, False),
    "0.19.0.dev0@0123abc": (1, 2, True),
    "0.19.0": (1, 2, True),
    "0.19.1": (2, 1, True),
    "0.20.0": (2, 1, True),
    "0.21.0": (2, 1, True),
    "0.21.1": (2, 1, True),
    "0.21.2": (2, 1, True),
    "0.22.0": (2, 1, True),
    "0.21.3.dev0@deadbeef": (2, 1, True),
}


@pytest.mark.parametrize(("version", "expected"), TABLE.items())
def test_each_release_has_its_rule(version, expected):
    rule = release_for(version)
    assert (rule.lora_A_axis(False), rule.lora_A_axis(True), rule.reads_swap_flag) == expected


def test_orientation_in_words():
    raw, reversed_, linear = RULES
    assert [raw.orientation(t) for t in (False, True)] == ["reversed", "linear"]
    assert [reversed_.orientation(t) for t in (False, True)] == ["reversed", "reversed"]
    assert [linear.orientation(t) for t in (False, True)] == ["linear", "linear"]


@pytest.mark.parametrize("version", ["0.16.0", "0.5"])
def test_releases_without_param_wrapper_are_refused(version):
    with pytest.raises(UnsupportedPeftError, match="no ParamWrapper.*pip install peft"):
        release_for(version)


@pytest.mark.parametrize("text", ["", "main", "@deadbeef", "0.19.x"])
def test_what_is_no_version_is_refused(text):
    with pytest.raises(UnsupportedPeftError, match="not a version number"):
        parse_version(text)


def test_the_installed_peft_measures_as_the_table_says():
    import peft

    measured = measure_rule(Version("0"))
    assert release_for(peft.__version__).agrees_with(measured)
    assert installed_rule() is release_for(peft.__version__)


def test_an_unknown_newer_release_is_taken_if_the_probe_agrees_and_refused_if_not():
    newest = RULES[-1]
    assert verified_rule("99.0", newest) is newest
    with pytest.raises(UnsupportedPeftError, match=r"newer than any tested release.*Update peft-moe-compat"):
        verified_rule("99.0", RULES[0])
    unheard_of = dataclasses.replace(newest, axis_plain=1, axis_transposed=2, reads_swap_flag=False)
    with pytest.raises(UnsupportedPeftError, match="Measured"):
        verified_rule("99.0", unheard_of)


def test_a_known_release_that_measures_otherwise_is_refused():
    with pytest.raises(UnsupportedPeftError, match="patched by another library"):
        verified_rule(NEWEST_TESTED, RULES[0])


def test_a_development_build_may_predate_its_row():
    assert verified_rule("0.19.0.dev0@abc", RULES[0]) is RULES[0]
    assert verified_rule("0.19.0.dev0@abc", RULES[1]) is RULES[1]


def test_the_probe_leaves_the_random_state_alone():
    import torch

    before = torch.get_rng_state()
    measure_rule(Version("0"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("error")
def test_the_probe_is_silent():
    measure_rule(Version("0"))


def test_known_issues_are_found_by_pair():
    assert known_issues("0.21.0", "5.23.0") != []
    symptoms = " ".join(issue.symptom for issue in known_issues("0.19.1", "5.12.1"))
    assert "distributed_operation" in symptoms
    assert "HybridCache" in known_issues("0.17.1", "5.0.0")[0].symptom
    assert not any("does not import" in i.symptom for i in known_issues("0.17.1", "4.57.6"))
    added = set(known_issues("0.21.2", "5.24.0")) - set(known_issues("0.21.2", "5.23.0"))
    assert ["model.add_adapter" in issue.symptom for issue in added] == [True]
    assert all(issue.remedy for issue in KNOWN_ISSUES)


def test_what_nobody_has_seen_end_may_still_hold():
    def codes(*pair):
        return {issue.code: issue.certain for issue in known_issues(*pair)}

    newer = f"{NEWEST_TESTED.major}.{NEWEST_TESTED.minor + 1}.0"
    assert codes(str(NEWEST_TESTED), str(NEWEST_TRANSFORMERS))["parametrised_accumulates"]
    assert codes(newer, str(NEWEST_TRANSFORMERS)) == {"parametrised_accumulates": False, "kbit_widens": False}
    assert codes("0.19.1", "5.99.0") == {
        "from_pretrained_distributed_operation": False,  # of transformers' doing, and nobody has seen it end
        "peft_too_old_for_transformers": False,
        "second_adapter": True,  # of this PEFT alone
        "parametrised_loses_gradient": True,
        "kbit_widens": True,
    }
    assert len({issue.code for issue in KNOWN_ISSUES}) == len(KNOWN_ISSUES)


def test_what_is_newer_than_tested_is_named():
    tested = str(NEWEST_TESTED), str(NEWEST_TRANSFORMERS)
    assert newer_than_tested(*tested) == newer_than_tested("0.18.1", "4.57.6") == {}
    assert newer_than_tested("99.0", tested[1]) == {"peft": tested[0]}
    assert newer_than_tested(f"{tested[0]}.dev0@abc", "99.0") == {"transformers": tested[1]}


def test_installed_versions_names_what_is_missing():
    found = installed_versions("packaging", "no-such-distribution")
    assert found["no-such-distribution"] == "not installed"
    assert parse_version(found["packaging"])
