from freqfusion import list_fusions
from freqfusion.cli.main import main


def test_a_line_each(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list_fusions()
    fade = next(line for line in lines if line.startswith("fade"))
    assert fade.split()[1:3] == ["yes", "47,257"]
    assert fade.endswith("2022")


def test_help_shows_an_example(capsys):
    assert main(["list", "--help"]) == 0
    assert "example:" in capsys.readouterr().out
