import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import tiny_features
from freqfusion.cli.main import main
from freqfusion.data import create_dataset
from freqfusion.features import catalog, create_upsampler
from freqfusion.tasks import FeatureData, FeatureModule
from freqfusion.training import create_trainer, load_checkpoint
from freqfusion.training.checkpoints import AtomicCheckpointIO
from tiny_features import ENCODER, UPSAMPLERS, encoder_weights, tiny_data, tiny_fit, tiny_module
from tiny_training import read_history


@pytest.fixture(autouse=True)
def tiny_upsamplers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in UPSAMPLERS.items():
        monkeypatch.setitem(catalog._METHODS, name, method)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoder_weights(tmp_path_factory.mktemp("weights"))


def write_image(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def images(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def test_training_finds_the_known_answer(tmp_path: Path) -> None:
    """The best factor on the interpolated features is that of least squares."""
    still = {"length": 2, "flip": 0.0, "ratio_range": (1.0, 1.0), "size": (64, 96)}  # of the crop
    model = {"lr": 0.2, "poly_power": 1.0, "betas": (0.5, 0.9)}
    module, _ = tiny_fit(
        tmp_path / "run", "scaled", model=model, data=still, max_steps=40, limit_val_batches=0
    )
    data = tiny_data(**still)
    image = torch.stack([data.transform("eval")(sample)["image"] for sample in data.dataset("train")])
    coarse = module.encoder(F.interpolate(image, (32, 48), mode="bilinear", antialias=True))
    target = module.encoder(image)
    fine = F.interpolate(coarse, target.shape[-2:], mode="bilinear")
    best = (fine * target).sum() / fine.square().sum()
    assert module.upsampler.scale.item() == pytest.approx(best.item(), rel=1e-2)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[0] == pytest.approx(target.square().mean().item(), rel=1e-3)
    assert losses[-1] == pytest.approx(F.mse_loss(best * fine, target).item(), rel=1e-3)
    assert losses[-1] < 0.95 * losses[0]


def test_the_encoder_is_frozen(tmp_path: Path) -> None:
    module, trainer = tiny_fit(tmp_path / "run", max_steps=3)
    fresh = tiny_module(encoder_weights(tmp_path / "weights"))
    state = module.encoder.network.state_dict()
    assert not module.encoder.network.training
    assert not any(part.training for part in module.encoder.network.modules())
    assert all(torch.equal(state[key], value) for key, value in fresh.encoder.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.encoder.network.parameters())
    assert all(key.startswith("upsampler.") for key in module.state_dict())
    trained = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert trained == len(list(module.upsampler.parameters())) == len(list(module.parameters()))
    content = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert content["state_dict"].keys() == module.state_dict().keys()
    asked = content["hyper_parameters"]
    assert (asked["encoder"], asked["upsampler"]) == (ENCODER, "noisy")
    assert asked["encoder_weights"] is asked["upsampler_weights"] is None
    assert module.double().encoder.network.norm.weight.dtype == torch.float64  # it goes where the module goes


@pytest.mark.parametrize(
    "options", [{"max_epochs": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}], ids=str
)
def test_a_resumed_run_equals_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    save, moments = AtomicCheckpointIO.save_checkpoint, []

    def save_and_keep(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path)
        if path.name == "last.ckpt":
            moments.append(shutil.copytree(path.parent, tmp_path / f"moment{len(moments)}"))

    model, data = {"factors": [2.0, 4.0, 1.5]}, {"length": 8}
    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_keep)
        whole, trainer = tiny_fit(tmp_path / "whole", model=model, data=data, **options)
    assert len(moments) >= 4
    for moment in moments[1:-1:4]:
        resumed, again = tiny_fit(moment, resume=moment / "last.ckpt", model=model, data=data, **options)
        for key, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], value), (moment, key)
        assert again.global_step == trainer.global_step
        assert read_history(moment) == read_history(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, tiny_features.__file__, str(tmp_path / "two")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(tiny_features.__file__).parent), *sys.path]),
        },
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    module, _ = tiny_fit(tmp_path / "one", "plain", data={"length": 5}, max_epochs=2)
    shared = torch.load(tmp_path / "two" / "last.ckpt", weights_only=True)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(shared["state_dict"][key], value, rtol=1e-4, atol=1e-6)
    rows = [read_history(tmp_path / name) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 4
    for one, two in zip(*rows, strict=True):
        for column, value in one.items():
            assert bool(value) == bool(two[column]), column
            if value:
                assert float(two[column]) == pytest.approx(float(value), rel=1e-4), column


def test_mixed_precision(tmp_path: Path) -> None:
    options = {"model": {"loss": "cosine_mse"}, "data": {"length": 6}}
    module, trainer = tiny_fit(tmp_path / "run", max_epochs=1, precision="bf16-mixed", **options)
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert float(trainer.callback_metrics["val_relative_mse"]) > 0


def test_losses(weights: str) -> None:
    target = torch.tensor([[[[1.0]], [[3.0]], [[5.0]]]])
    found = torch.tensor([[[[1.0]], [[3.0]], [[4.0]]]])
    assert tiny_module(weights).loss(found, target).item() == pytest.approx(1 / 3)
    cosine = F.cosine_similarity(found, target).item()
    expected = 1 - cosine + (1 / 4) ** 2 / 3  # the target ranges over 4
    assert tiny_module(weights, loss="cosine_mse").loss(found, target).item() == pytest.approx(expected)
    constant = torch.ones(1, 3, 2, 2)
    assert tiny_module(weights, loss="cosine_mse").loss(constant, constant).item() == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("factor, coarse", [(2.0, (2, 3)), (4.0, (1, 2)), (1.5, (3, 4)), (64.0, (1, 1))])
def test_what_goes_in(weights: str, factor: float, coarse: tuple[int, int]) -> None:
    module = tiny_module(weights, guide_size=48)
    features, guide, target = module._task_of(images(), factor)
    assert features.shape == (2, 64, *coarse)
    assert guide.shape == (2, 3, 32, 48)
    assert target.shape == (2, 64, 4, 6)
    assert torch.equal(target, module.encoder(images()))
    assert tiny_module(weights)._task_of(images(), factor)[1].shape == images().shape


def test_figures_of_an_evaluation(tmp_path: Path, weights: str) -> None:
    """The untrained upsampler gives zeros; interpolation is judged on the very same images."""
    module, data = tiny_module(weights, "scaled"), tiny_data(3)
    create_trainer(tmp_path, accelerator="cpu", enable_progress_bar=False).validate(
        module, data, verbose=False
    )
    assert module.results["relative_mse"] == pytest.approx(1)
    assert module.results["cosine"] == pytest.approx(0)
    batch = next(iter(data.val_dataloader()))["image"]
    assert batch.shape == (1, 3, 64, 96)
    error = power = 0.0
    for sample in data.val_dataloader():
        features, guide, target = module._task_of(sample["image"], 2.0)
        found = create_upsampler("bilinear")(features, guide, target.shape[-2:])
        error += (found - target).square().sum().item()
        power += target.square().sum().item()
    assert module.results["bilinear_relative_mse"] == pytest.approx(error / power, rel=1e-5)
    assert json.loads((tmp_path / "val_metrics.json").read_text()) == module.results
    assert not (tmp_path / "val_classes.csv").exists()


@pytest.mark.parametrize(
    "upsampler, options", [("naf", {"dim": 16, "kernel_size": 1}), ("jafar", {"qk_dim": 16})]
)
def test_published_upsamplers(tmp_path: Path, upsampler: str, options: dict[str, int]) -> None:
    """They go on exactly, with random places too, and load as any weights."""
    model = {"upsampler_options": options, "loss": "cosine_mse", "warmup_steps": 0}
    settings: dict[str, Any] = {"model": model, "data": {"length": 4}, "limit_val_batches": 0}
    whole, _ = tiny_fit(tmp_path / "whole", upsampler, max_steps=2, **settings)
    tiny_fit(tmp_path / "run", upsampler, max_steps=1, **settings)
    path = tmp_path / "run" / "last.ckpt"
    resumed, _ = tiny_fit(tmp_path / "run", upsampler, resume=path, max_steps=2, **settings)
    loaded = create_upsampler(upsampler, 64, weights=path, **options)
    fresh = create_upsampler(upsampler, 64, **options).state_dict()
    for key, value in whole.upsampler.state_dict().items():
        assert torch.equal(resumed.upsampler.state_dict()[key], value), key
        assert torch.equal(loaded.state_dict()[key], value), key
    assert any(not torch.equal(fresh[key], value) for key, value in loaded.state_dict().items())


def test_checkpoint(tmp_path: Path) -> None:
    module, _ = tiny_fit(tmp_path / "run", max_steps=2)
    path = tmp_path / "run" / "last.ckpt"
    with pytest.raises(ValueError, match=r"create_upsampler\('noisy', CHANNELS, weights="):
        load_checkpoint(path)
    started = tiny_module(encoder_weights(tmp_path / "weights"), upsampler_weights=str(path))
    upsampler = create_upsampler("noisy", 64, weights=path)
    for key, value in module.upsampler.state_dict().items():
        assert torch.equal(upsampler.state_dict()[key], value), key
        assert torch.equal(started.upsampler.state_dict()[key], value), key
    other = tiny_module(encoder_weights(tmp_path / "weights", seed=8))
    trainer = create_trainer(tmp_path, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="trained with other weights of the encoder"):
        trainer.validate(other, tiny_data(), ckpt_path=str(path))


def test_wrong_settings(tmp_path: Path, weights: str) -> None:
    with pytest.raises(ValueError, match="timm has no network 'vit_giga'"):
        FeatureModule("vit_giga")
    with pytest.raises(ValueError, match="'bilinear' has no weights, so there is nothing to train"):
        tiny_module(weights, "bilinear")
    with pytest.raises(ValueError, match="unknown upsampler 'nafta'"):
        tiny_module(weights, "nafta")
    with pytest.raises(ValueError, match=r"{'colour': 1} do not fit 'noisy'"):
        tiny_module(weights, upsampler_options={"colour": 1})
    with pytest.raises(ValueError, match=r"factors is .*, expected one or more numbers above 1"):
        tiny_module(weights, factors=[1.0])
    trainer = create_trainer(tmp_path / "run", max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="encoder test_vit has no weights"):
        trainer.fit(FeatureModule(ENCODER, upsampler="noisy"), tiny_data())
    with pytest.raises(ValueError, match=r"crop_size is 70x96, expected multiples of 16 .* 64x96"):
        trainer.fit(tiny_module(weights), tiny_data(crop_size=(70, 96)))
    with pytest.raises(
        ValueError, match=r"ratio_range is \(0.5, 1.0\), expected two rising factors of at least 1"
    ):
        tiny_data(ratio_range=(0.5, 1.0))
    assert not (tmp_path / "run").exists()


def test_images_cover_the_crop() -> None:
    data = FeatureData("synthetic", crop_size=(50, 30), dataset_options={"length": 1, "size": (20, 80)})
    sample = data.dataset("val")[0]
    for stage in ("train", "eval"):
        image = data.transform(stage)(sample)["image"]
        assert image.shape == (3, 50, 30)
        assert image.dtype == torch.float32
        assert type(image) is Tensor
        assert 0 <= image.min() < image.max() <= 1
    assert data.collate([]) == {"name": []}


def test_pictures(tmp_path: Path) -> None:
    for index in range(11):
        write_image(tmp_path / "all" / f"part{index % 2}" / f"{index:02}.png", (3, 4))
    write_image(tmp_path / "split" / "train" / "images" / "a.jpg", (3, 4))
    write_image(tmp_path / "split" / "val2017" / "b.JPG", (5, 6))
    (tmp_path / "split" / "val2017" / "list.txt").write_text("b")
    train, val = (create_dataset("pictures", tmp_path / "all", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (10, 1)
    assert {entry.image for entry in train.entries}.isdisjoint({entry.image for entry in val.entries})
    assert val[0]["name"] == "part1/07"
    assert val[0]["image"].shape == (3, 3, 4)
    split = tmp_path / "split"
    assert create_dataset("pictures", split, "train")[0]["name"] == "a"
    assert create_dataset("pictures", split, "val2017")[0]["image"].shape == (3, 5, 6)
    with pytest.raises(FileNotFoundError, match=r"test: no such folder. Pictures are read from"):
        create_dataset("pictures", split, "test")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fit, go on, judge: over the command line, whose settings a checkpoint keeps but for the encoder's weights."""
    for index in range(10):
        write_image(tmp_path / "pictures" / f"{index}.png", (40, 50))
    weights, out = encoder_weights(tmp_path), str(tmp_path / "run")
    words = [
        *("--task", "features", "--model.encoder", ENCODER, "--model.encoder_weights", weights),
        *("--model.upsampler", "noisy", "--model.upsampler_options.width", "5", "--data.crop_size", "32x48"),
        *("--data.root", str(tmp_path / "pictures"), "--data.batch_size", "3", "--data.workers", "0"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "4", "--trainer.val_check_interval", "4"),
        *("--trainer.check_val_every_n_epoch", "null", "--out", out),  # an epoch has 3 batches
    ]
    assert main(["fit", *words]) == 0
    assert "test_vit, noisy: 0.00 M parameters" in capsys.readouterr().out
    fitted = json.loads((tmp_path / "run" / "val_metrics.json").read_text())
    assert fitted.pop("step") == 4
    assert {"cosine", "relative_mse", "bilinear_cosine", "bilinear_relative_mse"} <= fitted.keys()
    assert (tmp_path / "run" / "best.ckpt").is_file()
    assert main(["fit", "--resume", "--out", out]) == 0
    assert main(["fit", "--resume", "--out", out, "--model.lr", "1"]) == 2
    assert "model.lr was" in capsys.readouterr().err
    judge = ["--checkpoint", str(tmp_path / "run" / "last.ckpt")]
    for command in ("validate", "test"):
        assert main([command, *judge]) != 0
        assert "give those with --model.encoder_weights" in capsys.readouterr().err
        assert main([command, *judge, "--model.encoder_weights", weights]) == 0
        assert "bilinear: cosine similarity" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "test_metrics.json").read_text()) == pytest.approx(fitted, rel=1e-6)
    assert main(["predict", str(tmp_path / "pictures"), *judge, "--out", str(tmp_path / "out")]) != 0
    assert "holds no network but an upsampler of features" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"encoder": "vit_small_patch16_224?pretrained=True"}, "would fetch or open something outside"),
        ({"encoder": "my_module:build"}, "code that is not run because a file names it"),
        ({"encoder": 3}, "is damaged: its encoder is 3"),
        ({"encoder_weights": "https://localhost/x.pth"}, "sets encoder_weights="),
        ({"upsampler_weights": "x.pth"}, "sets upsampler_weights="),
        ({"upsampler_options": {"weights": "x.pth"}}, "sets weights="),
        ({"upsampler_options": {"width": 10**6}}, "its upsampler cannot be made as it says"),
        ({"upsampler_options": {"width": 5}}, "does not fit the upsampler that it names"),
    ],
)
def test_checkpoints_of_somebody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str, changed: dict[str, Any], expected: str
) -> None:
    module = tiny_module(weights)
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {**module.hparams, "encoder_weights": None, **changed},
        "channels": 64,
        "task": "features",
    }
    torch.save(content, tmp_path / "changed.ckpt")
    assert main(["validate", "--checkpoint", str(tmp_path / "changed.ckpt")]) != 0
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--model.loss", "l1", "mse"),
        ("--model.factors", "[0.5]", "--model.factors is [0.5], expected"),
        ("--model.guide_size", "0", "--model.guide_size is 0, expected"),
        ("--model.milestones", "[2]", "--model.milestones"),
        ("--data.dataset", "nothing", "nothing"),
        ("--model.upsampler", "nothing", "unknown upsampler"),
        ("--model.encoder", "nothing", "timm has no network 'nothing'"),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
) -> None:
    words = ["--task", "features", "--model.encoder", ENCODER, "--model.upsampler", "noisy", option, value]
    assert main(["fit", *words, "--out", str(tmp_path / "run")]) != 0
    shown = capsys.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_upsamplers_see_the_image_as_the_encoder_does(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(name: str, encoder: torch.nn.Module) -> dict[str, Any]:
        return {"mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3)}

    monkeypatch.setattr("freqfusion.tasks.features.encoder_options", options)
    module = tiny_module(weights, "jafar", upsampler_options={"qk_dim": 16, "std": (0.5, 0.5, 0.5)})
    assert module.upsampler.mean == (0.4, 0.4, 0.4)
    assert module.upsampler.std == (0.5, 0.5, 0.5)
