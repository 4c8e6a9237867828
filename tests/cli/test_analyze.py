import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import freqfusion
from freqfusion import create_model
from freqfusion.analysis.record import fusion_sites, record_features
from freqfusion.analysis.similarity import FeatureSimilarity
from freqfusion.analysis.spectra import fusion_internals, kernel_spectrum
from freqfusion.analysis.subjects import Subject, load_subject, observe
from freqfusion.cli import analyze
from freqfusion.cli.main import main
from freqfusion.data.transforms import eval_transform
from freqfusion.metrics.boundary_distance import BoundaryDistance
from freqfusion.tasks import SegmentationModule
from freqfusion.training import load_checkpoint
from tiny_training import tiny_data


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Drawing is most of the time, and tested elsewhere."""
    for page in ("analysis.page", "drawing.page_parts"):
        monkeypatch.setattr(f"freqfusion.{page}.figure_bytes", lambda *args, **options: b"drawn")
    monkeypatch.setenv("COLUMNS", "100")


def save_checkpoint(path, fusion="freqfusion", seed=0, **data):
    torch.manual_seed(seed)
    datamodule = tiny_data(length=5, **data)
    module = SegmentationModule(
        "fpn_small", fusion, datamodule.num_classes, network_options={"channels": 8}, window=16
    )
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {
            **module.hparams,
            "network": {"spec": module.network.spec.to_json()},
            "network_options": None,
        },
        "datamodule_hyper_parameters": dict(datamodule.hparams),
        "classes": list(datamodule.classes),
        "palette": [list(colour) for colour in datamodule.palette],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return save_checkpoint(folder / "ours" / "best.ckpt"), save_checkpoint(
        folder / "plain" / "last.ckpt", "bilinear", seed=1
    )


def run(*words):
    return main(["analyze", *map(str, words)])


def summary(folder):
    rows = json.loads((folder / "results.json").read_text())["summary"]
    return {(row["level"], row["variant"]): row for row in rows}


def explorer(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="explorer-data">(.*?)</script>', page, re.DOTALL)[1])


def test_checkpoint_alone_brings_its_data(checkpoints, tmp_path, capsys):
    assert run("--checkpoint", checkpoints[0], "--out", tmp_path, "--limit", 3, "--pictures", 2) == 0
    printed = capsys.readouterr().out
    assert "IntraSim" in printed
    assert f"the page is {tmp_path / 'report.html'}" in printed.replace("\n", "")
    module, classes, _ = load_checkpoint(checkpoints[0])
    data = tiny_data(length=5)
    level = "decode_head.fpn.fusions.2"
    expected = {name: FeatureSimilarity(len(classes)) for name in ("before", "after")}
    for index in (0, 2, 4):
        sample = eval_transform()(data.sample("val", index))
        with record_features(module.network) as recorded, torch.no_grad():
            module.network(sample["image"].as_subclass(torch.Tensor)[None])
        (fine, coarse), (_, fused) = recorded[level]
        enlarged = torch.nn.functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        for name, features in (("before", enlarged), ("after", fused)):
            expected[name].update(features, sample["mask"][None].as_subclass(torch.Tensor))
    rows = summary(tmp_path)
    assert len(rows) == 6
    for name, similarity in expected.items():
        mean = similarity.compute().pixel_mean["all"]
        assert rows[level, name]["intra_all"] == pytest.approx(mean.intra, abs=1e-5)
        assert rows[level, name]["margin_all"] == pytest.approx(mean.margin, abs=1e-5)
    assert rows[level, "before"]["intra_all"] != rows[level, "after"]["intra_all"]

    shown = explorer(tmp_path)
    assert len(shown["scenes"]) == 2
    assert shown["variants"] == ["before", "after"]
    sample = data.sample("val", 0)
    assert shown["scenes"][0]["name"] == sample["name"]
    with torch.no_grad():
        image = eval_transform()(sample)["image"].as_subclass(torch.Tensor)[None]
        prediction = module.network(image).argmax(1)[0]  # whole, not in the windows of the training
    runs = shown["scenes"][0]["predictions"][0]["runs"]
    assert np.repeat(runs[::2], runs[1::2]).tolist() == prediction.flatten().tolist()


def test_two_checkpoints(checkpoints, tmp_path):
    ours, plain = checkpoints
    assert run("--checkpoint", ours, "--against", plain, "--out", tmp_path, "--limit", 1) == 0
    rows = summary(tmp_path)
    assert {name for _, name in rows} == {"plain before", "plain after", "ours before", "ours after"}
    level = "decode_head.fpn.fusions.0"
    before, after = rows[level, "plain before"], rows[level, "plain after"]  # bilinear is standard fusion
    assert {**before, "variant": ""} == {**after, "variant": ""}
    assert rows[level, "ours before"]["intra_all"] != after["intra_all"]
    shown = explorer(tmp_path)
    assert [shown["variants"][side] for side in shown["sides"]] == ["plain after", "ours after"]
    assert [entry["name"] for entry in shown["scenes"][0]["predictions"]] == ["plain", "ours"]

    out = tmp_path / "same"
    site = ("--sites", level)
    assert run("--checkpoint", ours, "--against", ours, "--out", out, "--limit", 1, *site) == 0
    assert set(summary(out)) == {
        (level, f"ours {name}") for name in ("A before", "A after", "B before", "B after")
    }


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_internals_and_boundaries_of_two_models(checkpoints, tmp_path, capsys):
    ours, plain = checkpoints
    assert run("--checkpoint", ours, "--against", plain, "--out", tmp_path, "--limit", 2) == 0
    assert "truth to" in capsys.readouterr().out
    subject, data = load_subject(ours), tiny_data(length=5)
    metric, responses, found = BoundaryDistance(data.num_classes), [], []
    for index in (1, 3):
        sample = eval_transform()(data.sample("val", index))
        with record_features(subject.network) as recorded, torch.no_grad():
            scores = subject.network(sample["image"].as_subclass(torch.Tensor)[None])
        labels = sample["mask"].as_subclass(torch.Tensor).long()[None]
        metric.update(scores.argmax(1), labels)
        module = subject.network.get_submodule(subject.sites[2])
        found.append(fusion_internals(module, *recorded[subject.sites[2]].inputs))
        responses.append(kernel_spectrum(found[-1].highpass_kernels, module.highpass_kernel, highpass=True))
    figures = tmp_path / "figures"
    rows = read(figures / "level3_kernels_model2.csv")
    response = [float(row["magnitude"]) for row in rows if row["filter"] == "high-pass"]
    mean = (responses[0].magnitude + responses[1].magnitude) / 2
    np.testing.assert_allclose(response, mean.flatten(), rtol=1e-4)
    detail = [float(row["detail"]) for row in read(figures / "level3_detail_model2.csv")]
    np.testing.assert_allclose(detail, found[0].detail.flatten(), rtol=1e-4, atol=1e-6)
    arrows = read(figures / "level3_offsets_model2.csv")
    offsets = found[0].offsets[0].unflatten(0, (2, -1)).mean(1)
    for row in arrows:
        place = int(row["row"]), int(row["column"])
        expected = offsets[(slice(None), *place)].tolist()
        assert [float(row["x"]), float(row["y"])] == pytest.approx(expected, abs=1e-6)
    assert not list(figures.glob("*_model1.*"))
    assert "fusions of other methods have none (plain)" in (tmp_path / "report.html").read_text()
    stored = json.loads((tmp_path / "results.json").read_text())["boundary_displacement"]
    assert [row for row in stored if row["model"] == "ours"] == [
        {"model": "ours", **row} for row in metric.compute().rows(data.classes)
    ]
    assert {row["model"] for row in read(tmp_path / "boundary_displacement.csv")} == {"plain", "ours"}
    for path in tmp_path.rglob("*.csv"):
        assert not re.search(r"\b(nan|inf)\b", path.read_text().lower()), path


class Host(torch.nn.Module):
    """A network with a pyramid that ``upgrade_`` knows."""

    def __init__(self):
        super().__init__()
        self.stages = torch.nn.ModuleList(
            [torch.nn.Conv2d(3, 8, 3, padding=1, stride=2), torch.nn.Conv2d(8, 8, 3, padding=1, stride=2)]
        )
        self.fpn = pytest.importorskip("torchvision.ops").FeaturePyramidNetwork([8, 8], 8)

    def forward(self, image):
        fine = self.stages[0](image)
        return self.fpn({"0": fine, "1": self.stages[1](fine)})


@pytest.mark.parametrize("fusion", ["freqfusion", "carafe", None])
def test_an_upgraded_host_runs_once(fusion):
    torch.manual_seed(0)
    host, data, calls = Host(), tiny_data(length=5), []
    if fusion:
        freqfusion.upgrade_(host, fusion)  # starts as it was: its gates are shut
    host.eval()
    host.register_forward_hook(lambda *args: calls.append(1))
    with record_features(host):
        sites = fusion_sites(host)
    (one,) = observe([Subject("host", host, sites, None)], data, "val", [0], torch.device("cpu"))
    assert len(calls) == 1
    assert one.predictions == {}
    inside = one.internals[sites[0]]["host"]
    if fusion != "freqfusion":
        assert inside is None
        return
    assert set(inside.kernels) == {"low-pass", "high-pass"}
    assert inside.offsets.shape == (2, 12, 16)
    assert inside.coarse_size == (6, 8)
    assert inside.detail.shape == (12, 16)
    assert not inside.detail.any()
    host.get_submodule(sites[0]).hr_gate.weight.data.fill_(0.5)
    (one,) = observe([Subject("host", host, sites, None)], data, "val", [0], torch.device("cpu"))
    with record_features(host) as recorded, torch.no_grad():
        host(eval_transform()(data.sample("val", 0))["image"].as_subclass(torch.Tensor)[None])
    full = fusion_internals(host.get_submodule(sites[0]).fusion, *recorded[sites[0]].inputs).detail
    assert full.max() > 0
    torch.testing.assert_close(one.internals[sites[0]]["host"].detail, full[0, 0] / 2, rtol=1e-3, atol=1e-5)


def test_a_network_that_gives_nan_is_named(checkpoints):
    subject = load_subject(checkpoints[0])
    with torch.no_grad():
        next(subject.network.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"ours, val-000000, decode_head.fpn.fusions.0: .*NaN"):
        next(observe([subject], tiny_data(length=5), "val", [0], torch.device("cpu")))


def make_folder(root, num_classes=8, size=(24, 32)):
    random = np.random.default_rng(0)
    for index in range(2):
        for kind, array in (
            ("images", random.integers(0, 256, (*size, 3), dtype=np.uint8)),
            ("masks", np.arange(size[0] * size[1]).reshape(size).astype(np.uint8) // 96 % num_classes),
        ):
            path = root / "val" / kind / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (root / "classes.txt").write_text("\n".join(f"kind {index}" for index in range(num_classes)))
    return root


def test_saved_model_on_a_folder(checkpoints, tmp_path, capsys):
    torch.manual_seed(0)
    model = create_model("fpn_small", num_classes=8, fusion="carafe", channels=8)
    freqfusion.save_pretrained(model, tmp_path / "saved")
    assert run("--checkpoint", tmp_path / "saved", "--out", tmp_path / "out") == 2
    assert "give a folder with --data.root" in capsys.readouterr().err
    data = make_folder(tmp_path / "data")
    assert run("--checkpoint", tmp_path / "saved", "--data.root", data, "--out", tmp_path / "out") == 0
    assert len(summary(tmp_path / "out")) == 6
    assert explorer(tmp_path / "out")["classes"][1] == "kind 1"
    # a checkpoint of another data set takes a folder too
    options = ("--data.resize", "16x48", "--out", tmp_path / "two")
    assert run("--checkpoint", checkpoints[0], "--data.root", data, *options) == 0
    assert explorer(tmp_path / "two")["scenes"][0]["height"] == 16

    fewer = make_folder(tmp_path / "fewer", num_classes=3)
    assert run("--checkpoint", tmp_path / "saved", "--data.root", fewer, "--out", tmp_path / "out") == 2
    assert "predicts 8 classes, the data has 3" in capsys.readouterr().err


def arrays():
    random = np.random.default_rng(0)
    labels = np.zeros((2, 12, 16), np.int64)
    labels[:, 5:] = 1
    labels[:, :, 12:] = 2
    return {
        "labels": labels,
        "images": random.integers(0, 256, (2, 12, 16, 3), dtype=np.uint8),
        "before": random.normal(size=(2, 5, 3, 4)).astype(np.float32),
        "after": random.normal(size=(2, 7, 6, 8)).astype(np.float32),
    }


def test_saved_features_of_every_format_give_the_same(tmp_path):
    given = arrays()
    for name, array in given.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "all.npz", **given)
    save_file({name: torch.from_numpy(array) for name, array in given.items()}, tmp_path / "all.safetensors")
    (tmp_path / "names.txt").write_text("sky\ntree\n\nroad\n")
    found = []
    for kind, files in (
        ("npy", [tmp_path / f"{name}.npy" for name in given]),
        ("npz", [tmp_path / "all.npz"]),
        ("safetensors", [tmp_path / "all.safetensors"]),
    ):
        out = tmp_path / kind
        assert run("--features", *files, "--classes", tmp_path / "names.txt", "--out", out) == 0
        found.append(summary(out))
        with (out / "similarity.csv").open(newline="") as file:
            assert {"sky", "tree", "road"} < {row["class"] for row in csv.DictReader(file)}
    assert found[0] == found[1] == found[2]
    expected = FeatureSimilarity(3)
    expected.update(torch.from_numpy(given["after"]), torch.from_numpy(given["labels"]))
    assert found[0]["features", "after"]["intra_all"] == pytest.approx(
        expected.compute().pixel_mean["all"].intra, abs=1e-9
    )


def test_saved_features_of_several_levels(tmp_path):
    given = arrays()
    levels = {f"{level}/{name}": given[name] for level in ("p3", "p2") for name in ("before", "after")}
    np.savez(tmp_path / "all.npz", labels=given["labels"], **levels)
    assert run("--features", tmp_path / "all.npz", "--out", tmp_path / "out") == 0
    assert [level for level, _ in summary(tmp_path / "out")] == ["p3", "p3", "p2", "p2"]
    assert explorer(tmp_path / "out")["classes"] == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": None}, "there is no array called 'labels'"),
        ({"before": None, "after": None}, "no features"),
        ({"labels": np.zeros((3, 12, 16), np.int64)}, "different numbers of images: {.*'labels': 3"),
        ({"labels": np.zeros((2, 16, 12), np.int64), "images": None}, "are they of the same image"),
        ({"labels": np.zeros((2, 12, 16))}, "labels must have shape .* and hold integers"),
        ({"labels": np.full((2, 12, 16), -1)}, "the labels reach from -1"),
        ({"labels": np.full((2, 12, 16), 255)}, "no pixel with a class"),
        ({"images": np.zeros((2, 12, 17, 3), np.uint8)}, "images and labels differ in size"),
        ({"images": np.zeros((2, 12, 16, 4), np.uint8)}, "images must have shape"),
        ({"after": np.zeros((2, 5, 6, 8), np.int64)}, "after must have shape .* floating point"),
        ({"after": np.zeros((2, 5, 6), np.float32)}, "after must have shape"),
        ({"after": np.zeros((2, 0, 6, 8), np.float32)}, "after must have shape"),
        ({"after": np.full((2, 5, 6, 8), np.nan, np.float32)}, "image 0, features, after: .*NaN"),
        ({"p3/after": np.zeros((2, 5, 6, 8), np.float32)}, "same variants"),
        ({"after": np.array([object()])}, "cannot be read as arrays of numbers"),
    ],
)
def test_saved_features_that_cannot_be_used(tmp_path, capsys, changes, message):
    given = {name: array for name, array in (arrays() | changes).items() if array is not None}
    np.savez(tmp_path / "all.npz", **given)
    assert run("--features", tmp_path / "all.npz", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("freqfusion analyze: error: ")
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, data", [("a.npy", b"x"), ("a.npz", b"x"), ("a.safetensors", b"x"), ("a.txt", b"")]
)
def test_files_that_are_none(tmp_path, capsys, name, data):
    assert run("--features", tmp_path / name, "--out", tmp_path / "out") == 2
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / name).write_bytes(data)
    assert run("--features", tmp_path / name, "--out", tmp_path / "out") == 2
    assert re.search("cannot be read|expected a .npy", capsys.readouterr().err)


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "one of the arguments --checkpoint --features is required"),
        (("--features", "a.npy", "--against", "b.ckpt"), "--features takes no --against"),
        (("--checkpoint", "a.ckpt", "--classes", "b.txt"), "--classes goes with --features"),
        (("--checkpoint", "a.ckpt", "--limit", "0"), "--limit is 0, expected a whole number of at least 1"),
        (
            ("--checkpoint", "a.ckpt", "--pictures", "0"),
            "--pictures is 0, expected a whole number of at least 1",
        ),
    ],
)
def test_words_that_do_not_go_together(tmp_path, capsys, words, message):
    assert run(*words, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_what_a_model_cannot_do_is_said(checkpoints, tmp_path, capsys):
    ours, _ = checkpoints
    cases = [
        (("--checkpoint", tmp_path / "none.ckpt"), "there is no checkpoint at"),
        (("--checkpoint", ours, "--sites", "backbone"), "has no fusion site 'backbone'; it has decode_head"),
        (("--checkpoint", ours, "--device", "moon"), "there is no device 'moon'"),
        (("--checkpoint", ours, "--split", "moon"), "moon"),
        (("--checkpoint", ours, "--data.dataset", "voc"), "is read from files"),
    ]
    for words, message in cases:
        assert run(*words, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    subjects = [load_subject(path) for path in checkpoints]
    subjects[1] = replace(subjects[1], sites=subjects[1].sites[:2])
    with pytest.raises(ValueError, match=r"as many fusion sites each .*'ours': 3, 'plain': 2"):
        next(observe(subjects, tiny_data(length=5), "val", [0], torch.device("cpu")))


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        analyze.run(["--help"])
    assert stop.value.code == 0
    assert "freqfusion analyze --checkpoint runs/camvid/best.ckpt --data.root" in capsys.readouterr().out
