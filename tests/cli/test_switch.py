"""`peft-moe-compat enable`, `disable`, `status`: in virtual environments of their own, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest
from support.limits import seconds
from typer.testing import CliRunner

import peft_moe_compat
from peft_moe_compat import at_start
from peft_moe_compat.cli import main as cli
from peft_moe_compat.cli import switch
from peft_moe_compat.patching import activation

PACKAGE = Path(peft_moe_compat.__file__).parent.parent
COMMAND = "from peft_moe_compat.cli.main import app; app()"
REACHED = "import sys, peft; print('reached', 'peft_moe_compat' in sys.modules)"
NAME = switch._NAME


class Environment:
    """A virtual environment that sees this one's packages as an editable install would: by a path in a .pth file."""

    def __init__(self, folder: Path) -> None:
        venv.EnvBuilder(symlinks=True).create(folder)
        self.folder = folder
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        self.sees(PACKAGE, sysconfig.get_path("purelib"))
        self.file = self.site / NAME

    def sees(self, *paths: Path | str) -> None:
        (self.site / "_editable.pth").write_text("".join(f"{path}\n" for path in paths))

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "PEFT_MOE"))}
        return subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            env=clean | environment,
            cwd=self.folder,
            timeout=600,
            check=False,
        )

    def command(self, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", COMMAND, name, **environment)

    def module(self, name: str, code: str) -> str:
        """A folder for PYTHONPATH with a package of that name, found before the installed one."""
        folder = self.folder / f"fake_{name}"
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(textwrap.dedent(code))
        return str(folder)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "venv")


@pytest.fixture
def enabled(environment):
    result = environment.command("enable")
    assert result.returncode == 0, result.stderr
    return environment


@pytest.fixture
def unsupported(enabled):
    """PYTHONPATH of a PEFT from before `ParamWrapper`; it imports at once."""
    return enabled.module("peft", "__version__ = '0.16.0'")


def test_on_and_off_leave_one_file_and_none(environment):
    def state():
        result = environment.command("status")
        assert not result.stderr
        return result.returncode, result.stdout

    code, said = state()
    assert code == 1
    assert said.startswith("off")
    before = set(environment.site.iterdir())
    assert str(environment.file) in environment.command("enable").stdout
    assert set(environment.site.iterdir()) - before == {environment.file}
    written = environment.file.stat().st_mtime_ns
    assert environment.command("enable").stdout.startswith("on already")
    assert environment.file.stat().st_mtime_ns == written
    code, said = state()
    assert code == 0
    assert f"on: {environment.file}, written by release {peft_moe_compat.__version__}\n" in said
    assert f"package: {PACKAGE / 'peft_moe_compat'}, release {peft_moe_compat.__version__}" in said
    result = environment.command("status", PEFT_MOE_COMPAT="0")
    assert result.returncode == 1
    assert "switched off in this shell" in result.stdout
    for expected in ("removed", "off already"):
        result = environment.command("disable")
        assert result.returncode == 0
        assert expected in result.stdout
    assert set(environment.site.iterdir()) == before
    assert state()[0] == 1


def test_a_start_pays_under_two_ms_and_imports_nothing(enabled):
    alone = enabled.folder / "alone"
    alone.mkdir()
    (alone / NAME).write_bytes(enabled.file.read_bytes())
    code = (
        "import site, sys, time; before = {*sys.modules}; start = time.process_time(); site.addsitedir(sys.argv[1]);"
        "print(time.process_time() - start, len({*sys.modules} - before), sys.meta_path[0].__class__.__name__)"
    )
    results = [enabled.run("-S", "-c", code, str(alone)).stdout.split() for _ in range(5)]
    assert min(float(took) for took, *_ in results) < seconds(0.002, child=True)
    assert {tuple(rest) for _, *rest in results} == {("0", at_start.PeftMoeCompatFinder.__name__)}


def test_the_real_peft_is_active_and_its_loader_is_its_own(enabled):
    code = (
        "import sys, importlib.util; importlib.util.find_spec('peft'); before = 'peft_moe_compat' in sys.modules;"
        "import peft; import peft_moe_compat;"
        "loaders = {type(loader).__name__ for loader in (peft.__spec__.loader, peft.__loader__)};"
        "print(before, peft_moe_compat.is_active(), *loaders)"
    )
    result = enabled.run("-c", code)
    assert result.stdout.split() == ["False", "True", "SourceFileLoader"], result.stderr
    assert enabled.run("-c", code, PEFT_MOE_COMPAT="0").stdout.split()[:2] == ["False", "False"]


LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port=0"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no"),
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_and_what_they_start_are_reached(launcher, enabled, unsupported):
    script = enabled.folder / "script.py"
    script.write_text(
        f"{REACHED}\nimport multiprocessing\nif __name__ == '__main__':\n"
        f"    child = multiprocessing.get_context('spawn').Process(target=exec, args=({REACHED!r},))\n"
        "    child.start(); child.join()\n"
    )
    result = enabled.run(*LAUNCHERS[launcher], str(script), PYTHONPATH=unsupported)
    assert result.returncode == 0, result.stderr
    # The script, the script as the child imports it, and the child.
    assert result.stdout.split() == ["reached", "True"] * 3, result.stderr
    result = enabled.run(*LAUNCHERS[launcher], str(script), PYTHONPATH=unsupported, PEFT_MOE_COMPAT="0")
    assert result.stdout.split() == ["reached", "False"] * 3, result.stderr


def test_an_uninstalled_package_is_nothing(enabled, unsupported):
    enabled.sees()
    result = enabled.run("-c", REACHED, PYTHONPATH=unsupported)
    assert (result.returncode, result.stdout, result.stderr) == (0, "reached False\n", "")


@pytest.mark.parametrize("options", [(), ("-W", "error")])
def test_an_unsupported_peft_is_imported_all_the_same_and_the_remedy_is_said(options, enabled, unsupported):
    result = enabled.run(*options, "-c", REACHED, PYTHONPATH=unsupported)
    assert result.returncode == 0
    assert result.stdout.startswith("reached")
    assert "is inactive" in result.stderr
    assert "0.16.0" in result.stderr
    assert "`disable`" in result.stderr or "`peft-moe-compat disable`" in result.stderr


@pytest.mark.parametrize(
    ("name", "code"), [("peft", "__version__ = '0.21.2'"), ("peft_moe_compat", "raise RuntimeError('half upgraded')")]
)
def test_what_nobody_foresaw_is_logged_and_peft_is_imported(name, code, enabled):
    path = enabled.module(name, code)
    if name != "peft":
        path += os.pathsep + enabled.module("peft", "")
    result = enabled.run("-c", REACHED, PYTHONPATH=path)
    assert (result.returncode, result.stdout) == (0, "reached False\n")
    assert "is inactive: " in result.stderr
    assert "PEFT_MOE_COMPAT=0" in result.stderr
    assert "Traceback" not in result.stderr
    assert not enabled.run("-c", REACHED, PYTHONPATH=path, PEFT_MOE_COMPAT="off").stderr


def test_a_peft_that_fails_fails_as_it_does_without(enabled):
    path = enabled.module("peft", "import nothing_of_the_kind")
    result = enabled.run("-c", REACHED, PYTHONPATH=path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'nothing_of_the_kind'"


def test_a_peft_that_is_there_already_is_reached_too(enabled, unsupported):
    code = f"import sys, peft, site; site.addsitedir({str(enabled.site)!r}); {REACHED}"
    assert enabled.run("-S", "-c", code, PYTHONPATH=unsupported).stdout == "reached True\n"


def test_it_goes_where_the_package_is_installed_for_the_user(tmp_path):
    user = Environment(tmp_path / "venv")
    user.python = Path(sys._base_executable)
    place = {"PYTHONUSERBASE": str(tmp_path / "user")}
    user.site = Path(user.run("-m", "site", "--user-site", **place).stdout.strip())
    user.site.mkdir(parents=True)
    user.sees(PACKAGE, sysconfig.get_path("purelib"))
    information = user.site / "peft_moe_compat-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: peft-moe-compat\nVersion: 0.1.0\n")
    result = user.command("enable", **place)
    assert result.stdout.startswith(f"on: {user.site / NAME}\n"), result.stderr
    assert user.command("status", **place).returncode == 0
    path = user.module("peft", "__version__ = '0.16.0'")
    assert user.run("-c", REACHED, PYTHONPATH=path, **place).stdout == "reached True\n"
    assert user.command("disable", **place).returncode == 0


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs a command in this process, for a site-packages and a user's one that are empty folders."""
    folders = [tmp_path / "purelib", tmp_path / "user"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(switch, "_purelib", lambda: folders[0])
    monkeypatch.setattr("site.getusersitepackages", lambda: str(folders[1]))
    monkeypatch.setattr(sys, "meta_path", [at_start.PeftMoeCompatFinder(), *sys.meta_path])
    return lambda command: CliRunner().invoke(cli.app, [command]), folders


def test_what_somebody_else_wrote_is_left_alone(here):
    run, (purelib, _) = here
    (purelib / NAME).write_text("import something\n")
    for command in ("enable", "disable", "status"):
        result = run(command)
        assert result.exit_code == 1
        assert "was not written by `peft-moe-compat enable`" in result.output
    assert (purelib / NAME).read_text() == "import something\n"


def test_what_is_stale_is_said_and_mended(here):
    run, (purelib, user) = here
    assert run("enable").exit_code == 0
    (user / NAME).write_text(f"{switch._MARK}0.0.1.\nimport sys\n")
    result = run("status")
    assert result.exit_code == 3
    assert f"on: {user / NAME}, written by release 0.0.1\n" in result.output
    assert f"stale: {user / NAME} is of another release" in result.output
    assert "one of the files is enough" in result.output
    assert run("disable").exit_code == 0
    (purelib / NAME).write_text(f"{switch._MARK}0.0.1.\nimport sys\n")
    assert run("enable").exit_code == 0
    assert run("status").exit_code == 0
    del sys.meta_path[0]
    result = run("status")
    assert result.exit_code == 3
    assert "this process has not read it" in result.output


def test_a_folder_that_cannot_be_written_is_said(here, monkeypatch):
    run, (purelib, _) = here

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(purelib))

    monkeypatch.setattr(Path, "replace", refuse)
    result = run("enable")
    assert result.exit_code == 1
    assert f"{purelib / NAME} cannot be read or written: " in result.output
    assert list(purelib.iterdir()) == []


def test_a_process_that_runs_stays_active_when_the_environment_is_switched_off(here):
    run, _ = here
    run("enable")
    assert run("disable").exit_code == 0
    assert peft_moe_compat.is_active()


def test_the_finder_gives_pefts_own_module(tmp_path, monkeypatch):
    """As in the subprocesses, where nothing measures which lines ran."""
    (tmp_path / "peft.py").write_text("import sys\nfound = __spec__.loader.is_package('peft')\n")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "peft")
    at_start.install()
    at_start.install()
    assert sum(type(finder) is at_start.PeftMoeCompatFinder for finder in sys.meta_path) == 1
    assert at_start.installed()
    import peft

    assert peft.found is False
    assert not isinstance(peft.__loader__, at_start.PeftMoeCompatLoader)
    at_start.install()


@pytest.mark.parametrize("error", [RuntimeError("half upgraded"), ModuleNotFoundError(name="wrapt")])
def test_errors_of_the_import_are_logged(error, monkeypatch, caplog):
    def fail(name):
        raise error

    def missing(name):
        raise ModuleNotFoundError(name="peft_moe_compat")

    monkeypatch.setattr(at_start, "__import__", fail, raising=False)
    at_start.activate()
    assert f"inactive: {type(error).__name__}" in caplog.text
    caplog.clear()
    with monkeypatch.context() as patched:
        patched.setenv("PEFT_MOE_COMPAT", "no")
        at_start.activate()
    monkeypatch.setattr(at_start, "__import__", missing, raising=False)
    at_start.activate()
    assert caplog.text == ""


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF", "1", "", "yes"])
def test_the_variable_means_the_same_to_both(value, monkeypatch):
    monkeypatch.setenv("PEFT_MOE_COMPAT", value)
    imported = []
    monkeypatch.setattr(at_start, "__import__", imported.append, raising=False)
    at_start.activate()
    assert bool(imported) is not activation.switched_off()
