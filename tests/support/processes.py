"""Scripts in a Python of their own, for what would change or end this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def result_of(script, *arguments):
    """What a script prints as JSON after the word RESULT, with `support` to import and the library active."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PEFT_MOE_COMPAT": "1"},
        timeout=600,  # for what hangs: importing alone takes a minute on a machine that does other things too
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))
