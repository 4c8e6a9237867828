"""Every model in the table of docs/hosts.md has the sites that the page says."""

import re
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import pytest

from freqfusion.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
PACKAGES = {"smp": "segmentation_models_pytorch"}
ROWS = re.findall(r"^\| `(\w+:[^`]+)` \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_table_has_all_libraries() -> None:
    libraries = {model.partition(":")[0] for model, _ in ROWS}
    assert libraries == {"torchvision", "transformers", "smp", "monai", "ultralytics"}


@pytest.mark.parametrize(("model", "sites"), ROWS, ids=[model.partition("?")[0] for model, _ in ROWS])
def test_command_prints_the_sites_of_the_table(
    model: str,
    sites: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = model.partition(":")[0]
    if find_spec(PACKAGES.get(library, library)) is None:
        pytest.skip(f"{library} is not installed")
    if "UNETR" in model:
        pytest.importorskip("einops")
    monkeypatch.chdir(tmp_path)
    assert main(["sites", model]) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("site ") :].partition("\n\n")[0].splitlines()[1:]  # MONAI 1.5 prints before
    found = [line.split()[0] for line in lines]
    patterns = re.findall(r"`([^`]+)`", sites)
    for path in found:
        assert any(fnmatchcase(path, pattern) for pattern in patterns), path
    for pattern in patterns:
        assert any(fnmatchcase(path, pattern) for path in found), pattern
