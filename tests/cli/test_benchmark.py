"""The command from end to end at one pixel, its explanations and its errors."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

from freqfusion.benchmarks import machine, runner, scaling
from freqfusion.cli.main import main
from freqfusion.ops import available_backends


def explained(capsys, *words):
    assert main(["benchmark", "--explain", "--device", "cpu", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_explain_says_which_backend_runs_and_why_not_the_others(capsys):
    lines = explained(capsys, "--ops", "carafe", "normalize", "--shapes", "odd", "one-pixel")
    at = lines.index("carafe k5 x2, 1x256x29x43 to 57x85 (cpu, float32)")
    native_absent = available_backends()["native"]
    if native_absent:
        assert lines[at + 1] == "  carafe(1x256x29x43, 1x25x57x85): torch"
        assert lines[at + 2] == f"    native cannot run because {native_absent}"
    else:
        assert lines[at + 1] == "  carafe(1x256x29x43, 1x25x57x85): native"
        assert "    torch could run too" in lines[at + 2 : at + 4]
    at = lines.index("normalize k5, 1x256x1x1 to 2x2 (cpu, float32)")
    assert lines[at + 1] == "  normalize_kernels(1x25x2x2): torch"
    assert lines[at + 2].startswith("    native cannot run because ")


def test_explain_knows_the_dtype(capsys):
    lines = explained(capsys, "--ops", "local_similarity", "--dtype", "float16")
    assert lines[0] == "local_similarity, 1x256x32x32 to 64x64 (cpu, float16)"
    assert lines[1].endswith(": torch")
    assert lines[4] == "local_similarity, NHWC, 1x256x32x32 to 64x64 (cpu, float16)"
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--ops", "karafe"], 2, "there is no operation 'karafe'; choose among carafe, "),
        (["--shapes", "tiny"], 2, "there is no set of shapes 'tiny'; choose among small, "),
        (["--ops", "segnext_t", "--shapes", "one-pixel"], 2, "cannot be measured at one-pixel"),
        (["--device", "abacus"], 2, "there is no device 'abacus' here"),
        (["--rounds", "0"], 2, "--rounds is 0, expected a whole number of at least 1"),
        (["--minutes", "0"], 2, "--minutes is 0.0, expected a number above 0"),
        (["--minutes", "nan"], 2, "--minutes is nan, expected a number above 0"),
        (["--shrink", "0"], 2, "--shrink is 0, expected a whole number of at least 1"),
        (["--training", "resnet"], 2, "there is no network 'resnet' here; choose among segnext_t, "),
        (["--threads", "-1"], 2, "--threads is -1, expected a whole number of at least 1"),
        (["--kernels", "90"], 2, "--kernels takes a compute capability such as sm_90, got '90'"),
        (["--dtype", "int8"], 2, "invalid choice: 'int8'"),
    ],
)
def test_wrong_requests_are_answered(capsys, tmp_path, words, code, message):
    assert main(["benchmark", "--out", str(tmp_path), *words]) == code
    assert message in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_run_at_one_pixel(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)
    monkeypatch.setattr(machine, "MATRIX_SIDE", 64)
    monkeypatch.setattr(runner, "MIN_SECONDS", 1e-4)
    monkeypatch.setattr(
        scaling,
        "AXES",
        (replace(scaling.AXES[2], values=(1, 2), shape=lambda batch: scaling._square(batch, 64, 2)),),
    )
    monkeypatch.setenv("COLUMNS", "40")
    out = tmp_path / "new"
    words = ["--ops", "normalize", "--shapes", "one-pixel", "--rounds", "2", "--threads", "1", "--scaling"]
    assert main(["benchmark", "--device", "cpu", "--out", str(out), *words]) == 0

    content = json.loads((out / "benchmark.json").read_text())
    assert {record["case"] for record in content["results"]} == {"normalize k5", "normalize k5, NHWC"}
    ran = [record for record in content["results"] if record["seconds"]]
    assert {record["contestant"] for record in ran} == {"unfold", "torch"}
    assert all(len(record["seconds"]) == 2 and record["times_unfold"] > 0 for record in ran)
    assert content["limits"]["flops_per_second"] > content["limits"]["bytes_per_second"] / 1e3 > 0
    assert content["conditions"]["threads"] == 1
    assert content["conditions"]["command"].startswith("freqfusion benchmark --device cpu")
    assert [point["value"] for point in content["scaling"]] == [1, 2]

    page = (out / "benchmark.md").read_text()
    for name in ("over_floor_forward.png", "over_floor_forward_backward.png", "time_by_batch.png"):
        assert (out / name).stat().st_size > 1000
        assert f"({name})" in page
    assert "## 1x256x1x1 to 2x2" in page

    shown = capsys.readouterr().out
    assert "How FreqFusion grows" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 106


def test_what_the_time_did_not_suffice_for_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)
    monkeypatch.setattr(machine, "MATRIX_SIDE", 64)
    words = ["--ops", "normalize", "resample", "--shapes", "one-pixel", "--minutes", "1e-9", "--scaling"]
    words += ["--training", "segnext_t", "--shrink", "16", "--rounds", "1"]
    assert main(["benchmark", "--device", "cpu", "--out", str(tmp_path), *words]) == 0
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert (content["results"], content["training"], content["scaling"]) == ([], [], [])
    expected = [
        *(
            f"{op}{layout}, 1x256x1x1{to}: the time was up"
            for to in ("", " to 2x2")
            for op in ("resample", "normalize k5")
            for layout in ("", ", NHWC")
        ),
        "scaling: the time was up",
        *(f"training segnext_t, {layout}: the time was up" for layout in ("NCHW", "NHWC")),
    ]
    assert content["left_out"] == expected
    assert f"- {expected[0]}" in (tmp_path / "benchmark.md").read_text()
    assert "Left out: scaling: the time was up" in capsys.readouterr().out


def test_training_steps_have_a_table(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)
    monkeypatch.setattr(machine, "MATRIX_SIDE", 64)
    words = ["--training", "segnext_t", "--shrink", "8", "--rounds", "1"]
    assert main(["benchmark", "--device", "cpu", "--out", str(tmp_path), *words]) == 0
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["results"] == []
    assert len(content["training"]) == 8
    assert all(record["images_per_second"] > 0 for record in content["training"])
    assert "| segnext_t | 1x64x64 | NHWC | freqfusion |" in (tmp_path / "benchmark.md").read_text()
    assert "Training steps" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_compiled_without_a_gpu():
    code = """
from freqfusion.cli.main import main
from freqfusion.benchmarks import kernels
first = next(kernels.cases())
kernels.cases = lambda: iter([first, first])  # a case that comes twice is printed once
kernels.first_step = lambda *args: kernels.compile_case(first, 80) * 2
main(["benchmark", "--kernels", "sm_80"])
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    header, *lines = done.stdout.splitlines()
    lines, last, steps = lines[:-5], lines[-5], lines[-4:]
    assert steps == [
        f"a first step of FreqFusion, {of}: {2 * len(lines)} launches of {len(lines)} kernels, none of them with "
        "spilled registers"
        for of in ("bfloat16 NHWC", "bfloat16 NCHW", "float32 NHWC", "float32 NCHW")
    ]
    assert header.split() == ["registers", "spilled", "shared", "warps", "seconds", "kernel,", "case"]
    assert lines
    assert len(lines) == len(set(lines))
    assert last == f"{len(lines)} kernels for sm_80, none of them with spilled registers"
    for line in lines:
        registers, spilled, shared, warps, *_ = line.split()
        assert 8 <= int(registers) <= 255
        assert (int(spilled), int(shared) <= 163 * 1024, int(warps) <= 16) == (0, True, True)
