from freqfusion import list_fusions
from freqfusion.cli.main import main
from freqfusion.features import list_upsamplers


def test_a_line_each(capsys):
    assert main(["list"]) == 0
    fusions, upsamplers = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert [line.split()[0] for line in fusions[1:]] == list_fusions()
    assert [line.split()[0] for line in upsamplers[1:]] == list_upsamplers()
    assert upsamplers[1].split()[1:] == ["no", "0", "interpolation"]
    fade = next(line for line in fusions if line.startswith("fade"))
    assert fade.split()[1:3] == ["yes", "47,257"]
    assert fade.endswith("2022")


def test_help_shows_an_example(capsys):
    assert main(["list", "--help"]) == 0
    assert "example:" in capsys.readouterr().out
