import argparse
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from freqfusion.cli import features
from freqfusion.cli.main import main
from freqfusion.features import BilinearFeatures, catalog
from freqfusion.features.extract import extract_features
from freqfusion.zoo.encoders import load_encoder

pytest.importorskip("timm")

ENCODER = "vit_small_patch16_224?embed_dim=24&depth=1&num_heads=2"


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, size in (("a", (40, 66)), ("street/b", (50, 37))):
        path = tmp_path / f"photos/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    torch.save(load_encoder(ENCODER).state_dict(), tmp_path / "w.pth")
    return tmp_path


def run(folder, *words, weights=True):
    given = ["--weights", folder / "w.pth"] if weights else []
    words = [folder / "photos", "--model", ENCODER, *given, "--out", folder / "out", *words]
    return main(["features", *map(str, words)])


def explorer(folder):
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="explorer-data">(.*?)</script>', page, re.DOTALL)[1])


def test_pictures_features_and_a_page(folder, capsys):
    assert run(folder, "--upsampler", "bilinear", "--save", "npy") == 0
    captured = capsys.readouterr()
    assert f"the page is {folder / 'out/report.html'}" in captured.out
    assert "random" not in captured.err
    picture = Image.open(folder / "out/pictures/a.png")
    assert picture.width > 3 * 66
    assert picture.height > 40
    saved = np.load(folder / "out/features/street/b/bilinear.npy")
    assert saved.shape == (1, 24, 50, 37)
    image = torch.tensor(np.asarray(Image.open(folder / "photos/street/b.png"))).permute(2, 0, 1)[None] / 255
    encoder = load_encoder(ENCODER, folder / "w.pth")
    with torch.no_grad():
        expected = BilinearFeatures()(extract_features(encoder, image), image)
    torch.testing.assert_close(torch.tensor(saved), expected)
    shown = explorer(folder)
    assert [scene["name"] for scene in shown["scenes"]] == ["a", "street/b"]
    assert shown["variants"] == ["coarse", "bilinear"]
    assert shown["classes"] == []
    assert shown["scenes"][0]["maps"][0][0]["size"][:2] == [3, 5]
    assert not list((folder / "out").rglob("*.tmp"))


def test_size_layers_and_safetensors(folder):
    words = ("--size", "30x40", "--resize", "20x33", "--layers", "-1", "0", "--chunk", 7, "--pictures", 1)
    assert run(folder, "--upsampler", "bilinear", "--save", "safetensors", *words) == 0
    assert load_file(folder / "out/features/a/bilinear.safetensors")["features"].shape == (1, 48, 30, 40)
    assert len(explorer(folder)["scenes"]) == 1
    assert len(list((folder / "out/pictures").rglob("*.png"))) == 2


def test_large_photos_are_made_smaller(folder):
    Image.new("RGB", (1024, 32)).save(folder / "photos/wide.png")
    assert run(folder, "--upsampler", "bilinear", "--save", "npy") == 0
    assert np.load(folder / "out/features/wide/bilinear.npy").shape == (1, 24, 16, 512)


class Learned(BilinearFeatures):
    def __init__(self, channels):
        super().__init__(channels)
        self.gain = torch.nn.Parameter(torch.ones(1))

    def upsample(self, features, image, size, chunk):
        return super().upsample(features, image, size, chunk) * self.gain


def test_random_weights_are_said(folder, capsys, monkeypatch):
    monkeypatch.setitem(catalog._METHODS, "learned", catalog._Method(Learned, True, "none", 0))
    words = ("--upsampler", "bilinear", "--upsampler", "learned")
    assert run(folder, *words, weights=False) == 0
    errors = capsys.readouterr().err
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    for text in (errors, page):
        assert "vit_small_patch16_224?embed_dim=24" in text
        assert "has random weights; give it its own with --weights" in text
        assert "random weights, whose results mean nothing: learned; give each" in text
    torch.save({"gain": torch.zeros(1)}, folder / "u.pth")
    words = (*words, "--upsampler-weights", f"learned={folder / 'u.pth'}", "--save", "npy")
    assert run(folder, *words) == 0
    assert "random" not in capsys.readouterr().err
    assert not np.load(folder / "out/features/a/learned.npy").any()
    assert np.load(folder / "out/features/a/bilinear.npy").any()


def test_what_upsamplers_must_know_of_the_encoder():
    """UPLiFT enlarges images for patches of 14, and sees them, as JAFAR does, normalised as the encoder does."""
    names = ["bilinear", "jafar", "uplift"]
    args = argparse.Namespace(upsampler=names, files={})
    encoder = load_encoder(ENCODER)  # patches of 16, mean and deviation 0.5
    made = features._upsamplers(args, encoder, 24)
    assert [tuple(made[name].mean) for name in names[1:]] == [(0.5,) * 3] * 2
    assert made["uplift"].patch_size == 16
    assert made["jafar"].channels == made["uplift"].channels == 24


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--upsampler", "nothing"], "unknown upsampler 'nothing'; choose one of: bilinear"),
        (["--upsampler", "bilinear", "--upsampler", "bilinear"], "names a method twice"),
        (
            ["--upsampler", "bilinear", "--upsampler-weights", "naf=x.pth"],
            "expected NAME=FILE with a NAME of",
        ),
        (["--upsampler", "bilinear", "--upsampler-weights", "bilinear"], "expected NAME=FILE"),
        (["--upsampler", "bilinear", "--size", "12"], "is not a height and a width"),
        (["--upsampler", "bilinear", "--size", "2x40"], r"size \(2, 40\) is smaller than the features'"),
        (["--upsampler", "bilinear", "--chunk", "0"], "--chunk is 0, expected a whole number of at least 1"),
        (["--upsampler", "bilinear", "--layers", "4"], "which has 1: 0 to 0"),
        (["--upsampler", "bilinear", "--device", "abacus"], "there is no device 'abacus'"),
        (["--upsampler", "bilinear", "--model", "vit_nothing"], "timm has no network 'vit_nothing'"),
        (
            ["--upsampler", "bilinear", "--model", "resnet18?nothing=1"],
            "unexpected keyword argument 'nothing'",
        ),
        (["--upsampler", "bilinear", "--weights", "nothing.pth"], "no weights file at nothing.pth"),
        ([], "required: --upsampler"),
    ],
)
def test_wrong_lines(folder, capsys, words, reason):
    assert run(folder, *words) == 2
    errors = capsys.readouterr().err
    assert re.search(reason, errors.replace("\n", " "))
    assert "Traceback" not in errors
    assert not (folder / "out").exists()


def test_images_that_cannot_be_told_apart_and_videos(folder, capsys):
    same = folder / "photos/street/a.png"
    Image.new("RGB", (20, 20)).save(same)
    options = ["--model", ENCODER, "--upsampler", "bilinear", "--out", str(folder / "out")]
    assert main(["features", str(folder / "photos/a.png"), str(same), *options]) == 2
    assert "two images would both be called a: name the folder that holds both" in capsys.readouterr().err
    clip = folder / "clip.mp4"
    clip.touch()
    assert main(["features", str(clip), *options]) == 2
    assert "clip.mp4 is a video, expected images" in capsys.readouterr().err
    assert main(["features", "nowhere", *options]) == 2
    assert "nowhere does not exist; give an image, a folder or a pattern" in capsys.readouterr().err


def test_the_image_that_an_upsampler_refuses_is_named(folder, capsys):
    assert run(folder, "--upsampler", "naf") == 2
    assert "error: a: naf: a window of 9 coarse rows does not fit" in capsys.readouterr().err
