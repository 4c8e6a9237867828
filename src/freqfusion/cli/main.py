"""The command ``freqfusion``: finds the command asked for and gives it the rest of the line."""

import ast
import difflib
import importlib
import os
import sys
from pathlib import Path


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
            "With the environment variable FREQFUSION_DEBUG=1 errors come with their traceback.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``freqfusion``; those of this process if not given.

    Returns:
        The exit code: 0 done, 1 failed, 2 asked wrongly, 130 stopped by Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
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
        code: int = module.run(rest)
    except SystemExit as stop:  # argparse's way to end
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print(f"\nfreqfusion {name}: stopped", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError) as error:
        if os.environ.get("FREQFUSION_DEBUG"):
            raise
        print(f"freqfusion {name}: error: {error}", file=sys.stderr)
        return 1
    return code
