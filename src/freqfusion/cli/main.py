"""The command ``freqfusion``: finds the command asked for and gives it the rest of the line."""

import ast
import ctypes
import difflib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

from freqfusion._optional import IMPORT_VARIABLE

OUT_OF_MEMORY = "out of memory|not enough memory|can't allocate memory"
"""How torch says it, on any device."""
USAGE = (FileExistsError, FileNotFoundError, ImportError, IsADirectoryError, NotADirectoryError, ValueError)
"""What is wrong with a line or with the files that it names; other errors come from the machine."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's ``malloc.h``."""


def list_commands() -> dict[str, str]:
    """Every command and its one-line description, read without importing it."""
    commands = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != "main" and not path.stem.startswith("_"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            commands[path.stem] = docstring.partition("\n")[0]
    return commands


def overview() -> str:
    """The text of ``freqfusion --help``."""
    commands = list_commands()
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {line}" for name, line in commands.items()]
    return "\n".join(
        [
            "usage: freqfusion COMMAND [options]",
            "",
            "Frequency-aware feature fusion (FreqFusion) for dense prediction.",
            "",
            "commands:",
            *lines,
            "",
            "freqfusion COMMAND --help describes a command and shows an example.",
            "Every command takes --import FILE.py (or a module's name): it is imported first, to register a",
            "fusion method of your own. FREQFUSION_IMPORT does the same; separate several by commas.",
            "With the environment variable FREQFUSION_DEBUG=1 errors come with their traceback.",
        ]
    )


def _import_extensions(argv: list[str]) -> list[str]:
    """Import what ``--import`` and ``FREQFUSION_IMPORT`` name; returns the words without ``--import``.

    All names go to the environment variable, so that processes started by a command import them too.
    """
    names, rest = os.environ.get(IMPORT_VARIABLE, "").split(","), []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--import":
            rest.append(word)
            continue
        name = value if equals else next(words, "")
        if not name:
            raise ValueError("--import needs a file (FILE.py) or the name of a module")
        names.append(name)
    names = list(dict.fromkeys(name for name in names if name))
    for name in names:
        if not name.endswith(".py"):
            importlib.import_module(name)
            continue
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name} to import")
        loaded = getattr(sys.modules.get(path.stem), "__file__", None)
        if loaded is not None and Path(loaded).resolve() == path.resolve():
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None  # a .py file has a loader
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    if names:
        os.environ[IMPORT_VARIABLE] = ",".join(names)
    return rest


def calm_threads() -> None:
    """Let OpenMP threads sleep soon when they wait, here and in every process started from here.

    Threads of libgomp spin at each barrier, which beside other work takes the core from the very thread they
    wait for. The variable is read when torch is imported, so this comes before that; the user's settings win.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_memory() -> None:
    """Let glibc keep up to 256 MiB that were freed, for the next step, where the user has not set it up.

    It would give them back after each step and get them anew, cleared page by page: a fifth of the time of a small
    network on a CPU. Maps of more than 32 MiB, glibc's own limit, are still given back at once.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**28)):
            mallopt(option, size)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``freqfusion``; those of this process if not given.

    Returns:
        The exit code: 0 done, 1 failed, 2 the line or a file it names is wrong, 130 stopped by Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    calm_threads()
    keep_memory()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = argv
    commands = list_commands()
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(commands)}"
        print(f"freqfusion: error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"freqfusion.cli.{name}")
    try:
        code: int = module.run(_import_extensions(rest))
    except SystemExit as stop:  # argparse's way to end
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print(f"\nfreqfusion {name}: stopped", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError) as error:
        if os.environ.get("FREQFUSION_DEBUG"):
            raise
        print(f"freqfusion {name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, USAGE) else 1
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        short = isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, reason)
        if os.environ.get("FREQFUSION_DEBUG") or not short:
            raise
        print(f"freqfusion {name}: error: there is not enough memory for that: {reason}", file=sys.stderr)
        return 1
    return code
