"""What a run shows, in a terminal and in a file."""

import re
from pathlib import Path

import pytest
import rich

from freqfusion.drawing import figures
from tiny_training import read_history, tiny_fit


def test_a_curve_is_drawn_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(figures, "learning_curve", lambda curves, *_, **__: drawn.append(len(curves["mIoU"])))
    tiny_fit(tmp_path, "plain", max_epochs=2, log_steps=3)
    assert drawn == [1, 2]
    assert [row["step"] for row in read_history(tmp_path)][-1] == "10"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch, terminal: bool) -> None:
    """A bar in a terminal, nothing of it in a file, and a line after each validation in both."""
    monkeypatch.setattr(rich, "_console", None)  # Lightning changes it for all later tests
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    else:
        monkeypatch.delenv("FORCE_COLOR", raising=False)
    tiny_fit(tmp_path, "plain", max_epochs=2, enable_progress_bar=True)
    out, err = capfd.readouterr()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err)
    steps = re.findall(
        r"step (\d+)/10  loss [\d.]+  val mIoU [\d.]+  boundary IoU [\d.]+  left 0:00:\d\d\n", plain
    )
    assert steps == ["5", "10"]
    assert ("10/10" in re.sub(r"step 10/10", "", plain)) == terminal
    assert ("\x1b" in err) == terminal
    if not terminal:
        assert len(plain.splitlines()) == 2
    assert "last validation, %" in out
