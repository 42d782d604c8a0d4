"""A PEFT that is not out yet: the same code under a newer number works, another layout under it is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest

from peft_moe_compat.releases import NEWEST_TESTED, RULES, release_for

TESTS = Path(__file__).parent
newest_layout = pytest.mark.skipif(
    release_for(peft.__version__) is not RULES[-1],
    reason="this PEFT has an older layout, so under a newer number it is one that changed it",
)


def run(*command: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        capture_output=True,
        text=True,
        cwd=TESTS,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@newest_layout
def test_the_core_of_the_suite_passes_where_the_version_alone_is_raised():
    core = ["model/test_oracle.py", "forward/test_layer.py"]
    core += [f"forward/test_models.py::test_{name}" for name in ("loss_and_every_gradient_equal_stock_peft",)]
    out = run("-m", "pytest", "-q", "-p", "support.newer_peft", "-p", "no:cacheprovider", *core)
    (summary,) = [line for line in out.splitlines() if " passed" in line]
    assert int(summary.split(" passed")[0].split()[-1]) > 100
    assert "failed" not in summary


@newest_layout
def test_it_is_said_to_be_newer_than_tested():
    out = run(
        "-c",
        textwrap.dedent(
            """
            from support import newer_peft, zoo
            import peft_moe_compat
            from typer.testing import CliRunner
            from peft_moe_compat.cli.main import app

            model = zoo.peft_model(zoo.tiny_model(zoo.FAMILIES[0]))
            report = peft_moe_compat.report(model)
            print(report.untested, {p.path for row in report.rows for p in row.parameters})
            print("note: this peft is newer than any tested release" in str(report))
            result = CliRunner().invoke(app, ["check"], env={"COLUMNS": "300"})
            print(result.exit_code, newer_peft.VERSION + ", newer than any tested release" in result.output)
            print("may still hold: " in result.output)
            """
        ),
    )
    untested, said, checked, known = out.splitlines()
    assert untested.startswith(f"{{'peft': '{NEWEST_TESTED}'}}")
    assert (said, checked, known) == ("True", "0 True", "True")


# What a release that turned the axes round again would do: written into PEFT's own module, as its authors would.
CHANGED = """
import warnings
from support import newer_peft
import peft.tuners.lora.layer as layer
if changed:
    exec(
        "def get_delta_weight(self, adapter_name, *args, **kwargs):\\n"
        "    return _before(self, adapter_name, *args, **kwargs).flip(0)\\n",
        vars(layer) | {"_before": layer.ParamWrapper.get_delta_weight},
        scope := {},
    )
    layer.ParamWrapper.get_delta_weight = scope["get_delta_weight"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_moe_compat
    from peft_moe_compat.errors import UnsupportedPeftError
said = [str(w.message) for w in caught if issubclass(w.category, peft_moe_compat.CompatWarning)]
assert len(said) == 1 and "peft_moe_compat is inactive" in said[0], said
assert not peft_moe_compat.is_active()
try:
    peft_moe_compat.activate()
except UnsupportedPeftError as error:
    print(error)
stock = vars(layer.ParamWrapper)["forward"]
assert stock.__module__ == "peft.tuners.lora.layer", stock
"""


def test_another_layout_under_a_newer_number_is_refused():
    older = release_for(peft.__version__) is not RULES[-1]
    out = run("-c", f"changed = {not older}\n{CHANGED}")
    assert re.search(r"PEFT 0.99.0 (could not be probed|.newer than any tested release. does not lay out)", out)
    assert "PEFT's own forward stays in place" in out
