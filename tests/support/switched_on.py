"""A folder for PYTHONPATH in which the package is switched on, as `peft-moe-compat enable` does an environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from peft_moe_compat.cli import main as cli

__all__ = ["switch_on"]


def switch_on(folder: Path, monkeypatch: Any) -> None:
    """Makes the folder, which a start of Python reads as it does a site-packages."""
    folder.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("peft_moe_compat.cli.switch._folder", lambda: folder)
        assert CliRunner().invoke(cli.app, ["enable"]).exit_code == 0
    (folder / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(folder)!r})\n")
