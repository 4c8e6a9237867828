import os
import platform
import subprocess
import sys

import pytest

from freqfusion.cli import main as main_module
from freqfusion.cli.main import list_commands, main


def test_overview_names_every_command_with_a_line(capsys):
    commands = list_commands()
    assert {"fit", "validate", "test", "predict", "quickstart"} <= set(commands)
    assert all(5 < len(line) < 120 for line in commands.values())
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        text = capsys.readouterr().out
        for name, line in commands.items():
            assert f"  {name}" in text
            assert line in text


def test_unknown_command(capsys):
    assert main(["fot"]) == 2
    assert capsys.readouterr().err == "freqfusion: error: there is no command 'fot'; did you mean 'fit'?\n"
    assert main(["xyzzy"]) == 2
    assert (
        "choose one of analyze, benchmark, compare, convert, doctor, export, features, fit, "
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "error, code, words",
    [
        (FileNotFoundError("no folder a/b"), 2, "freqfusion fit: error: no folder a/b\n"),
        (ValueError("bad"), 2, "freqfusion fit: error: bad\n"),
        (ImportError("install it"), 2, "freqfusion fit: error: install it\n"),
        (OSError("no space left"), 1, "freqfusion fit: error: no space left\n"),
        (KeyboardInterrupt(), 130, "\nfreqfusion fit: stopped\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("text"), 1, ""),
    ],
)
def test_errors_become_one_line_and_a_code(monkeypatch, capsys, error, code, words):
    import freqfusion.cli.fit

    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(freqfusion.cli.fit, "run", fail)
    assert main(["fit"]) == code
    assert capsys.readouterr().err == words


def test_bugs_keep_their_traceback(monkeypatch):
    import freqfusion.cli.fit

    def fail(argv: list[str]) -> int:
        raise ValueError("bad") if argv else RuntimeError("a bug")

    monkeypatch.setattr(freqfusion.cli.fit, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fit"])
    monkeypatch.setenv("FREQFUSION_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"):
        main(["fit", "--seed", "1"])


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "freqfusion", "nothing"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no command 'nothing'" in done.stderr
    assert main_module.overview().startswith("usage: freqfusion COMMAND")


def test_import_is_done_once_and_passed_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FREQFUSION_IMPORT", "")
    extension = tmp_path / "counting_extension.py"
    extension.write_text("import sys\nsys.count = getattr(sys, 'count', 0) + 1\n")
    monkeypatch.setattr(sys, "count", 0, raising=False)
    assert main(["list", f"--import={extension}", "--import", str(extension)]) == 0
    assert sys.count == 1
    assert main_module.os.environ["FREQFUSION_IMPORT"] == str(extension)
    assert main(["list", "--import", str(tmp_path / "none.py")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["list", "--import"]) == 2
    assert "--import needs a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "1000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_waiting_threads_sleep_before_torch_is_imported(given, expected):
    """libgomp reads the variables once, when torch loads it; the user's own settings stay."""
    code = """
import os, sys
from freqfusion.cli.main import main
main(["--help"])
print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**environment, **given}
    )
    assert result.stdout.splitlines()[-1] == f"False {expected}"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize("given, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_for_the_next_step(given, kept):
    code = """
import resource
from freqfusion.cli.main import main
main(["--help"])
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [bytearray(2**20) for _ in range(200)]
    for part in parts:
        part[::4096] = bytes(256)
    del part, parts
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, **given}, check=True
    )
    faults = int(result.stdout.split()[-1])  # of 51,200 pages
    assert faults < 1000 if kept else faults > 10_000
