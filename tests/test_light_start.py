"""What only reads or explains starts without torch; and what only computes is there when it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

OUTPUT = Path(__file__).parent / "pins/written/0.1.0/outputs/merge"
PROGRAM = """
import contextlib, io, json, sys
from importlib.metadata import entry_points
from pathlib import Path
from safeshard.streamer.cli.app import main
printed = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
    main(sys.argv[1:])
heavy = {"torch", "numpy", "triton", "transformers", "huggingface_hub", "fsspec", "matplotlib"} & sys.modules.keys()
status = Path("/proc/self/status")  # ru_maxrss would count the parent before exec
peak = int(status.read_text().partition("VmHWM:")[2].split()[0]) if status.exists() else 0
print(json.dumps([sorted(heavy), peak, printed.getvalue()]))
"""
COMMANDS = {
    "version": (["--version"], "safeshard "),
    "help": (["--help"], "demo"),
    "help of a method": (["safemerge", "--help"], "--threshold"),
    "help of calibrate": (["calibrate", "--help"], "--samples"),
    "inspect": (["inspect", str(OUTPUT)], "model"),
    "verify": (["verify", str(OUTPUT)], "every byte"),
    "report": (["report", str(OUTPUT), "--output", "report.html"], "report.html"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_compute_nothing_import_nothing_heavy(command: str, tmp_path: Path) -> None:
    arguments, expected = COMMANDS[command]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    heavy, kilobytes, printed = json.loads(done.stdout)
    assert expected in printed
    assert heavy == []
    assert kilobytes < 100_000


def test_the_package_shows_what_it_has_before_it_loads_it() -> None:
    program = "import safeshard, sys; print('torch' in sys.modules, dir(safeshard), safeshard.__version__)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("False")
    assert "'safemerge'" in shown


def test_the_package_is_no_namespace() -> None:
    """A distribution of another name cannot add to it."""
    import safeshard

    assert safeshard.__file__ is not None
    assert len(safeshard.__path__) == 1


def test_an_unknown_name_is_an_attribute_error() -> None:
    import safeshard

    with pytest.raises(AttributeError, match="safemrge"):
        safeshard.safemrge  # noqa: B018


STOPPED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from safeshard.__main__ import entry
entry()
"""


@pytest.mark.parametrize("module", ["safeshard.streamer.cli.app", "typer", "pydantic", "safeshard.streamer.options"])
def test_an_interrupt_while_it_is_imported_ends_it_with_one_line(module: str) -> None:
    # the background of a shell ignores it
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    words = [sys.executable, "-c", heard + STOPPED, module, "inspect", "x"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stderr == "safeshard: interrupted; nothing was begun\n"
    assert done.returncode == 130


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + STOPPED
    done = subprocess.run([sys.executable, "-c", program, "typer", "--version"], capture_output=True, text=True)
    assert done.returncode == 2  # the command line is that of this program: no such command
    assert "interrupted" not in done.stderr


def test_the_console_script_is_that_entry() -> None:
    (script,) = entry_points(group="console_scripts", name="safeshard")
    assert script.value in ("safeshard.__main__:entry", "safeshard.streamer.cli.app:entry")  # of an older install
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'safeshard = "safeshard.__main__:entry"' in text
