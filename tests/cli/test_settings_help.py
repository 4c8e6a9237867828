"""The help of fit, validate and test is read from the source; it names what the real parser takes."""

import subprocess
import sys

import pytest

from freqfusion.cli._settings_help import SOURCES, command_help
from freqfusion.cli.main import list_commands

OF_JSONARGPARSE = {"--model", "--data", "--help", "--model.help", "--data.help", "--seed_everything"}


@pytest.mark.parametrize("command", ["", *list_commands()])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        "import sys\n"
        "from freqfusion.cli.main import main\n"
        f"assert main({[command, '--help'] if command else ['--help']!r}) == 0\n"
        "late = {'torch', 'lightning', 'jsonargparse', 'transformers', 'torchvision'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize("task", SOURCES)
def test_it_names_every_setting_of_the_parser(
    command: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    from freqfusion.cli._lightning import CommandLine

    parsers = []
    monkeypatch.setattr(LightningCLI, "_add_subcommands", lambda *args: None, raising=False)
    monkeypatch.setattr(CommandLine, "parse_arguments", lambda self, parser, args: parsers.append(parser))
    with pytest.raises((AttributeError, TypeError)):  # there are no settings to go on with
        CommandLine(command, "", ["--task", task])
    (parser,) = parsers
    taken = {
        option
        for action in parser._actions
        for option in action.option_strings
        if option.startswith(("--model.", "--data.")) and "suppress" not in str(action.help).lower()
    }
    taken = {option.rstrip("+") for option in taken if not option.endswith(".help")}
    text = command_help(command, "", ["--task", task])
    named = {word for word in text.split() if word.startswith(("--model.", "--data."))}
    assert taken - {"--model.num_classes", "--model.things", "--data.seed"} == named
