"""The parser of the commands that are not built on Lightning."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from freqfusion._settings import BOUNDS, check_settings


class CommandParser(argparse.ArgumentParser):
    """Takes no abbreviations and no empty words, holds numbers against the table of bounds, and errs in one line.

    Args:
        command: the command's name.
        description: what it does.
        epilog: an example.
        group: of its numbers in the table; by default the command's name.
    """

    def __init__(self, command: str, description: str | None, epilog: str, group: str = "") -> None:
        super().__init__(
            prog=f"freqfusion {command}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.group = group or command

    def error(self, message: str) -> NoReturn:
        """End with one line."""
        print(f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse and check; ``parse_args`` comes here too."""
        for word in args or ():
            if not word.strip() or (word.startswith("--") and word.endswith("=")):
                self.error(f"{word!r} names nothing; is it an empty variable of the shell?")
        parsed, rest = super().parse_known_args(args, namespace)
        if self.group in BOUNDS:
            try:
                checked = check_settings(self.group, vars(parsed), "--{}")
            except ValueError as error:
                self.error(str(error))
            vars(parsed).update(checked)
        return parsed, rest


def whole_number(text: str) -> Any:
    """A whole number, perhaps written as 48.0. The bounds are checked later."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        return int(number) if number.is_integer() else number


whole_number.__name__ = "whole number"  # so argparse calls it in its errors


def image_size(text: str) -> tuple[int, int]:
    """Height and width, written as 512x768."""
    match = re.fullmatch(r"(\d+)(?:\.0+)?x(\d+)(?:\.0+)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a height and a width such as 512x768")
    return int(match[1]), int(match[2])
