import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torchvision.transforms.v2 import functional as TF

from freqfusion.cli import predict
from freqfusion.cli.main import main
from freqfusion.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from freqfusion.models.inference import predict_logits
from freqfusion.prediction.pixels import predict_mask
from freqfusion.tasks import SegmentationModule
from freqfusion.training import load_checkpoint
from support import png_bytes

CLASSES = ("sky", "tree", "path")
PALETTE = ((70, 130, 180), (20, 140, 20), (200, 180, 90))


def save_checkpoint(path, num_classes=3, resize=None, **settings):
    torch.manual_seed(3)
    module = SegmentationModule(
        "fpn_small", "bilinear", num_classes, network_options={"channels": 8}, **settings
    )
    module.network.decode_head.conv_seg.weight.data *= 30  # so that several classes occur
    classes = [*CLASSES, *(f"c{index}" for index in range(3, num_classes))][:num_classes]
    palette = [*PALETTE, *((index % 256, 0, 0) for index in range(3, num_classes))][:num_classes]
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {
            **module.hparams,
            "network": {"spec": module.network.spec.to_json()},
            "network_options": None,
        },
        "datamodule_hyper_parameters": {"resize": resize},
        "classes": classes,
        "palette": [list(colour) for colour in palette],
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model.ckpt")


def picture(height=45, width=61, seed=0):
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def expected_mask(checkpoint, rgb, resize=None, **settings):
    module, _, _ = load_checkpoint(checkpoint)
    image = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    size = image.shape[-2:]
    if resize is not None:
        image = TF.resize(image, list(resize), antialias=True)
    x = (image / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    logits = predict_logits(module.network, x[None], **settings)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0].argmax(0).numpy()


def assert_same_mask(path, expected):
    with Image.open(path) as image:
        actual = np.asarray(image)
    assert actual.shape == expected.shape
    # a pixel whose two best classes tie to within rounding may fall either way
    assert (actual == expected).mean() > 0.999


def run(source, checkpoint, out, *options):
    return main(["predict", str(source), "--checkpoint", str(checkpoint), "--out", str(out), *options])


def test_writes_mask_colours_overlay_and_shares(tmp_path, checkpoint, capsys):
    rgb = picture()
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", checkpoint, tmp_path / "out") == 0
    expected = expected_mask(checkpoint, rgb)
    assert len(np.unique(expected)) > 1
    assert_same_mask(tmp_path / "out/masks/a.png", expected)
    with Image.open(tmp_path / "out/masks/a.png") as image:
        assert image.mode == "P"
        mask, shown = np.asarray(image), np.asarray(image.convert("RGB"))
    colours = np.asarray(Image.open(tmp_path / "out/colours/a.png"))
    np.testing.assert_array_equal(colours, np.array(PALETTE, np.uint8)[mask])
    np.testing.assert_array_equal(shown, colours)
    overlay = np.asarray(Image.open(tmp_path / "out/overlays/a.png"))
    assert overlay.shape[0] >= 45
    assert overlay.shape[1] > 61 + 40
    legend = overlay[:, 61:]
    for index in range(3):
        swatch = (legend == np.array(PALETTE[index], np.uint8)).all(-1).any()
        assert swatch == (mask == index).any()

    with open(tmp_path / "out/class_shares.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert [int(row["pixels"]) for row in rows] == [int((mask == index).sum()) for index in range(3)]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-5)
    shares = json.loads((tmp_path / "out/class_shares.json").read_text())["shares"]["a"]
    assert shares == pytest.approx([float((mask == index).mean()) for index in range(3)])
    printed = capsys.readouterr().out
    assert all(name in printed for index, name in enumerate(CLASSES) if (mask == index).any())
    assert not list(tmp_path.rglob("*.tmp"))


def odd_pictures(folder):
    """Pictures of every odd kind, and what each should look like upright in RGB."""
    rgb = picture()
    grey = rgb[..., 0]
    expected = {}
    rotated = Image.fromarray(np.rot90(rgb).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter for display
    rotated.save(folder / "exif.png", exif=exif)
    expected["exif"] = rgb
    Image.fromarray(grey).save(folder / "grey.png")
    expected["grey"] = np.repeat(grey[..., None], 3, axis=2)
    Image.fromarray(np.dstack([rgb, np.full(grey.shape, 77, np.uint8)])).save(folder / "rgba.png")
    expected["rgba"] = rgb
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    expected["deep"] = expected["grey"]
    with Image.fromarray(rgb).quantize(16) as indexed:
        indexed.save(folder / "palette.png")
        expected["palette"] = np.asarray(indexed.convert("RGB"))
    Image.fromarray(rgb[:1, :1]).save(folder / "pixel.png")
    expected["pixel"] = rgb[:1, :1]
    Image.fromarray(rgb[:, :1]).save(folder / "column.bmp")
    expected["column"] = rgb[:, :1]
    return expected


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_is_the_terminals_alone(tmp_path, checkpoint, capsys, monkeypatch, terminal):
    """What is printed can go to a file without it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", checkpoint, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "1 of 1 images predicted" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
    assert "predicting" not in out
    assert ("predicting" in err) == terminal


def test_pictures_of_every_odd_kind(tmp_path, checkpoint):
    (tmp_path / "in").mkdir()
    expected = odd_pictures(tmp_path / "in")
    assert run(tmp_path / "in", checkpoint, tmp_path / "out") == 0
    for name, rgb in expected.items():
        assert_same_mask(tmp_path / f"out/masks/{name}.png", expected_mask(checkpoint, rgb))
        assert (tmp_path / f"out/overlays/{name}.png").is_file()
    assert len(json.loads((tmp_path / "out/class_shares.json").read_text())["shares"]) == len(expected)


def test_large_picture_goes_through_in_tiles(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("freqfusion.prediction.pixels.LARGE_PIXELS", 5000)
    monkeypatch.setattr("freqfusion.prediction.pixels.TILE", 64)
    monkeypatch.setattr("freqfusion.prediction.pixels.MARGIN", 64)
    # whole multiples of the coarsest stride, but not of the tile: elsewhere the ratios between a pyramid's
    # levels, and with them all positions, differ a little between a tile and the whole
    rgb = picture(144, 208)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", checkpoint, tmp_path / "out") == 0
    assert_same_mask(tmp_path / "out/masks/a.png", expected_mask(checkpoint, rgb))


def test_works_at_the_size_of_the_training(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", resize=(24, 40))
    rgb = picture()
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", checkpoint, tmp_path / "out") == 0
    expected = expected_mask(checkpoint, rgb, resize=(24, 40))
    assert_same_mask(tmp_path / "out/masks/a.png", expected)
    assert (expected != expected_mask(checkpoint, rgb)).any()


def test_inference_settings_come_from_the_line_or_else_from_the_training(tmp_path):
    trained = {"window": 32, "stride": 16, "scales": [1.0, 0.5], "flip_test": True}
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", **trained)
    rgb = picture()
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", checkpoint, tmp_path / "out") == 0
    settings = {"window": 32, "stride": 16, "scales": (1.0, 0.5), "flip": True}
    by_training = expected_mask(checkpoint, rgb, **settings)
    assert_same_mask(tmp_path / "out/masks/a.png", by_training)
    line = ("--window", "40", "--stride", "20", "--scales", "1", "1.5")
    assert run(tmp_path / "a.png", checkpoint, tmp_path / "out", *line) == 0
    by_line = expected_mask(checkpoint, rgb, window=40, stride=20, scales=(1.0, 1.5), flip=True)
    assert_same_mask(tmp_path / "out/masks/a.png", by_line)
    assert (by_line != by_training).any()


def test_same_names_do_not_overwrite_each_other(tmp_path, checkpoint):
    for index, name in enumerate(("a.png", "a.bmp", "sub/a.png")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(20, 20 + index)).save(path)
    assert run(tmp_path / "in", checkpoint, tmp_path / "in/out") == 0
    assert run(tmp_path / "in", checkpoint, tmp_path / "in/out") == 0  # results are no input
    sizes = {}
    for path in (tmp_path / "in/out/masks").rglob("*.png"):
        with Image.open(path) as image:
            sizes[path.relative_to(tmp_path / "in/out/masks").as_posix()] = image.size[0]
    assert sizes == {"a.png.png": 20, "a.bmp.png": 21, "sub/a.png": 22}


def test_more_than_255_classes_take_16_bits(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", num_classes=300)
    rgb = picture()
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", checkpoint, tmp_path / "out") == 0
    expected = expected_mask(checkpoint, rgb)
    assert expected.max() > 255
    assert_same_mask(tmp_path / "out/masks/a.png", expected)


def test_bad_picture_is_named_or_left_out(tmp_path, checkpoint, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture()).save(tmp_path / "in/good.png")
    data = (tmp_path / "in/good.png").read_bytes()
    (tmp_path / "in/broken.png").write_bytes(data[: len(data) // 2])
    assert run(tmp_path / "in", checkpoint, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "broken.png" in error
    assert "--skip-bad" in error
    shutil.copy(tmp_path / "in/broken.png", tmp_path / "in/later.png")
    (tmp_path / "in/broken.png").unlink()
    assert run(tmp_path / "in", checkpoint, tmp_path / "first") == 2  # what came before it is complete
    assert "1 images before it are in" in capsys.readouterr().err
    shares = json.loads((tmp_path / "first/class_shares.json").read_text())["shares"]
    assert list(shares) == ["good"]
    assert run(tmp_path / "in", checkpoint, tmp_path / "out", "--skip-bad") == 0
    printed = capsys.readouterr().out
    assert "left out" in printed
    assert "1 of 2 images predicted" in printed
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["good.png"]
    (tmp_path / "in/good.png").unlink()
    assert run(tmp_path / "in", checkpoint, tmp_path / "out", "--skip-bad") == 2
    assert "none of the 1 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case, message",
    [
        ("missing", "no checkpoint"),
        ("foreign", "is not a"),
        ("folder", "no image in"),
        ("source", "does not exist"),
        ("device", "there is no device 'nonsense' here; choose one of cpu"),
        ("stride", "without a window"),
        ("score", "--score does not apply to this network's task, semantic segmentation"),
        ("inside", "the images are within the folder of the results"),
    ],
)
def test_wrong_input_is_answered_in_one_line(tmp_path, checkpoint, capsys, case, message):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": torch.zeros(2)}, foreign)
    source = {
        "folder": tmp_path / "empty",
        "source": tmp_path / "nowhere",
        "inside": tmp_path / "out" / "photos",
    }.get(case, tmp_path / "a.png")
    (tmp_path / "out" / "photos").mkdir(parents=True)
    weights = {"missing": tmp_path / "no.ckpt", "foreign": foreign}.get(case, checkpoint)
    options = {
        "device": ("--device", "nonsense"),
        "stride": ("--stride", "3"),
        "score": ("--score", "0.3"),
    }.get(case, ())
    assert run(source, weights, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("freqfusion predict: error: ")
    assert message in error


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        predict.run(["--help"])
    assert stop.value.code == 0
    assert "freqfusion predict photos/ --checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["claim", "memory", "network", "truncated", "empty"])
def test_one_bad_picture_costs_one_line(tmp_path, checkpoint, capsys, monkeypatch, kind):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "c.png"):
        Image.fromarray(picture()).save(tmp_path / "in" / name)
    bad = tmp_path / "in/b.png"
    Image.fromarray(picture(30, 40)).save(bad)
    if kind == "claim":
        bad.write_bytes(png_bytes(40_000, 30_000, 8, 2, b"\0" * 20))
    elif kind in ("truncated", "empty"):
        bad.write_bytes(bad.read_bytes()[: 100 if kind == "truncated" else 0])
    elif kind == "memory":
        load = ImageFile.ImageFile.load

        def short_of_memory(self):
            if str(self.filename).endswith("b.png"):
                raise MemoryError
            return load(self)

        monkeypatch.setattr(ImageFile.ImageFile, "load", short_of_memory)
    else:

        def out_of_memory(network, image, **settings):
            if image.shape[1:] == (30, 40):
                raise RuntimeError(
                    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
                )
            return predict_mask(network, image, **settings)

        monkeypatch.setattr("freqfusion.prediction.writers.predict_mask", out_of_memory)
    assert run(tmp_path / "in", checkpoint, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "b.png" in error
    assert run(tmp_path / "in", checkpoint, tmp_path / "out", "--skip-bad") == 0
    assert "2 of 3 images predicted" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == ["a.png", "c.png"]


def test_other_failures_of_the_network_are_not_left_out(tmp_path, checkpoint, monkeypatch):
    def broken(network, image, **settings):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("freqfusion.prediction.writers.predict_mask", broken)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(tmp_path / "a.png", checkpoint, tmp_path / "out", "--skip-bad")


def test_brackets_in_class_names_are_no_markup(tmp_path, checkpoint, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["classes"] = ["[/]", "[bold]", "path\n"]
    torch.save(content, tmp_path / "model.ckpt")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", tmp_path / "model.ckpt", tmp_path / "out") == 0
    assert "[/]" in capsys.readouterr().out
