"""``freqfusion benchmark --features``: measured lines beside the published ones, errors."""

import json
import os

import pytest

from freqfusion.benchmarks.features import PUBLISHED
from freqfusion.cli.main import main


def test_a_run_at_few_pixels(capsys, tmp_path):
    words = ["--features", "featup_jbu", "naf", "--sides", "32", "--device", "cpu", "--threads", "1"]
    assert main(["benchmark", *words, "--chunk", "8", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "features.json").read_text())
    featup, naf = content["figures"]
    assert featup["name"] == "featup_jbu"
    assert featup["side"] == 32
    assert featup["seconds"] > 0
    assert featup["process_bytes"] is None or featup["process_bytes"] > 2**26
    assert naf["seconds"] is None  # what cannot run does not end the others
    assert "9 coarse rows" in naf["problem"]
    assert "8 rows at a time" in content["conditions"]
    page = (tmp_path / "features.md").read_text()
    assert page.startswith(f"`{content['command']}`")
    assert "| 32 | featup_jbu | " in page
    assert "| x16 (448) | naf | 662,528 | 265 | 56 | 1787 | 6016 |" in page
    assert capsys.readouterr().out == page


def test_published_costs_count_the_parameters_of_ours():
    from freqfusion.features import create_upsampler, describe_upsamplers

    ours = {info.name: info.parameters for info in describe_upsamplers()}
    # they count FeatUp's with its layer norm
    with_norm = create_upsampler("featup_jbu", 384, norm=True)
    ours["featup_jbu"] = sum(parameter.numel() for parameter in with_norm.parameters())
    assert {name: cost.parameters for name, cost in PUBLISHED.items()} == {
        name: ours[name] for name in PUBLISHED
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "nearest"], "there is no upsampler 'nearest'; choose from: bilinear, "),
        (["--features", "--sides", "12"], "--sides must be at least 16, the side of a patch, got 12"),
        (["--features", "--compile"], "--compile does not go with --features"),
        (["--features", "--cost"], "--features does not go with --cost"),
        (["--chunk", "3"], "--chunk does not go without --features"),
    ],
)
def test_wrong_requests_are_answered(capsys, tmp_path, words, message):
    assert main(["benchmark", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
    assert not os.listdir(tmp_path)
