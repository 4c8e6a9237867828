import inspect
import json
import shutil
import signal
from typing import Union

import pytest
import torch
import yaml
from lightning import Trainer

from freqfusion.cli.main import main
from freqfusion.training.callbacks import History
from tiny_training import read_history

CONFIG = {
    "model": {"network": "fpn_small", "fusion": "bilinear", "lr": 1e-3, "warmup_steps": 2},
    "data": {
        "dataset": "synthetic",
        "dataset_options": {"length": 6, "size": [32, 48]},
        "crop_size": [32, 48],
        "batch_size": 2,
        "workers": 0,
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
}


def write_config(folder, **changes):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    out = folder / "run"
    assert main(["fit", "--config", str(write_config(folder)), "--out", str(out), "--seed", "3"]) == 0
    return out


def figures(path):
    content = json.loads(path.read_text())
    content.pop("step", None)
    return content


def test_run_folder(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "best.ckpt",
        "config.yaml",
        "last.ckpt",
        "learning_curve.png",
        "metrics.csv",
        "run.json",
        "val_classes.csv",
        "val_metrics.json",
    }
    facts = json.loads((run / "run.json").read_text())
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert facts["steps"] == checkpoint["global_step"]
    assert facts["parameters"] > 1000
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["lr"] == 1e-3
    assert saved["seed_everything"] == 3
    assert saved["out"] == str(run)
    assert saved["resume"] is False
    content = torch.load(run / "last.ckpt", weights_only=True)
    assert content["global_step"] == 6
    assert content["datamodule_hyper_parameters"]["seed"] == 3
    lines = (run / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "3", "6"]


@pytest.mark.parametrize("command, stage", [("validate", "val"), ("test", "test")])
def test_a_checkpoint_gives_the_same_figures_again(run, tmp_path, capsys, command, stage):
    assert main([command, "--checkpoint", str(run / "last.ckpt"), "--out", str(tmp_path)]) == 0
    assert figures(tmp_path / f"{stage}_metrics.json") == figures(run / "val_metrics.json")
    text = capsys.readouterr().out
    assert f"mIoU {100 * figures(run / 'val_metrics.json')['miou']:.2f}" in text
    assert "pole" in text


def test_settings_of_a_checkpoint_can_be_changed(run, tmp_path):
    argv = ["test", "--checkpoint", str(run / "last.ckpt"), "--out", str(tmp_path)]
    assert (
        main([*argv, "--model.flip_test", "true", "--data.dataset_options", "{length: 3, size: [32, 48]}"])
        == 0
    )
    assert figures(tmp_path / "test_metrics.json") != figures(run / "val_metrics.json")


def test_with_a_config_and_a_path(run, tmp_path):
    config = write_config(tmp_path)
    argv = ["test", "--config", str(config), "--checkpoint", str(run / "last.ckpt"), "--out", str(tmp_path)]
    assert main(argv) == 0
    assert figures(tmp_path / "test_metrics.json") == figures(run / "val_metrics.json")


def test_a_run_is_not_overwritten_but_goes_on(run, tmp_path, capsys):
    config = write_config(tmp_path)
    argv = ["fit", "--config", str(config), "--out", str(run)]
    before = (run / "last.ckpt").read_bytes()
    assert main(argv) == 2
    assert "already holds a run: go on with it by adding --resume" in capsys.readouterr().err
    assert (run / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    "words, change",
    [
        (["--model.lr", "0.1"], "model.lr was 0.001, now 0.1"),
        (["--model.fusion", "sapa"], 'model.fusion was "bilinear", now "sapa"'),
        (
            ["--data.batch_size", "3", "--model.warmup_steps", "1"],
            "warmup_steps was 2, now 1; data.batch_size was 2",
        ),
        (["--seed", "4"], "data.seed was 3, now 4"),
    ],
)
def test_a_run_goes_on_with_its_own_settings(run, tmp_path, capsys, words, change):
    own = shutil.copytree(run, tmp_path / "run")
    argv = ["fit", "--config", str(write_config(tmp_path)), "--out", str(own), "--seed", "3", "--resume"]
    assert main([*argv, *words]) == 2
    assert change in capsys.readouterr().err
    assert (own / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert main([*argv, "--model.boundary_width", "2", "--data.eval_batch_size", "2"]) == 0  # it has ended


def test_resume_takes_from_the_run_what_is_not_given(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    assert main(["fit", "--resume", "--out", str(own), "--trainer.max_epochs", "3"]) == 0
    checkpoint = torch.load(own / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 9
    assert checkpoint["hyper_parameters"]["network"]["spec"]["name"] == "fpn_small"
    assert checkpoint["hyper_parameters"]["lr"] == 1e-3
    assert main(["fit", "--checkpoint", str(own / "last.ckpt"), "--trainer.max_epochs", "4"]) == 0
    assert torch.load(own / "last.ckpt", weights_only=True)["global_step"] == 12


def test_resume_alone_needs_a_run(tmp_path, capsys):
    assert main(["fit", "--resume", "--out", str(tmp_path / "typo")]) == 2
    assert f"there is no checkpoint at {tmp_path / 'typo' / 'last.ckpt'}" in capsys.readouterr().err
    assert main(["fit", "--resume"]) == 2
    assert "Name its folder with --out" in capsys.readouterr().err


def test_its_own_config_judges_a_run(run, tmp_path):
    argv = ["test", "--config", str(run / "config.yaml"), "--checkpoint", str(run / "best.ckpt")]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert figures(tmp_path / "test_metrics.json") == figures(run / "val_metrics.json")


def test_a_run_without_validation_says_so(tmp_path, capsys):
    argv = ["fit", "--config", str(write_config(tmp_path)), "--out", str(tmp_path / "run")]
    assert main([*argv, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "2"]) == 0
    out = capsys.readouterr().out
    assert "nothing was judged (see --trainer.check_val_every_n_epoch" in out
    assert str(tmp_path / "run" / "last.ckpt") in out
    assert not (tmp_path / "run" / "best.ckpt").exists()


def test_ctrl_c_says_how_to_go_on_and_resume_does(tmp_path, monkeypatch, capsys):
    argv = ["fit", "--config", str(write_config(tmp_path)), "--out", str(tmp_path / "run")]
    argv += ["--checkpoint_steps", "2", "--seed", "1"]
    handler = signal.getsignal(signal.SIGINT)

    def stop(self, trainer, *args, **kwargs):
        if trainer.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(History, "on_train_batch_start", stop, raising=False)
        assert main(argv) == 130
    signal.signal(signal.SIGINT, handler)
    out = capsys.readouterr().out
    assert (
        f"stopped at step 5; repeat the line with --resume to go on from {tmp_path / 'run' / 'last.ckpt'}"
        in out
    )
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert main([*argv, "--resume"]) == 0
    resumed = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    whole = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    for key, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value), key
    assert read_history(tmp_path / "run") == read_history(tmp_path / "whole")


@pytest.mark.parametrize(
    "argv, code, words",
    [
        (["--config", "missing.yaml"], 2, "missing.yaml"),
        (["--model.learning", "3"], 2, "--model.learning"),
        (["--model.lr", "fast"], 2, "model.lr"),
        (["--data.dataset", "camvid", "--data.root", "no/such/folder"], 2, "no/such/folder: no such folder"),
        (["--data.dataset", "sinthetic"], 2, "unknown dataset 'sinthetic'"),
        (["--model.network", "segnext_x"], 2, "unknown model 'segnext_x'"),
        (["--model.network_options", "{colour: 1}"], 2, "network_options {'colour': 1} do not fit"),
        (["--checkpoint", "none.ckpt"], 2, "there is no checkpoint at none.ckpt"),
        (["--checkpoint", "last"], 2, "no checkpoint at"),
    ],
)
def test_wrong_lines_get_one_clear_line(tmp_path, capsys, argv, code, words):
    assert main(["fit", "--out", str(tmp_path / "run"), *argv]) == code
    err = capsys.readouterr().err
    assert err.startswith("freqfusion fit: error: ")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_wrong_key_in_a_config(tmp_path, capsys):
    config = write_config(tmp_path, model={"netwrok": "fpn_small"})
    assert main(["fit", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "netwrok" in capsys.readouterr().err


def test_judging_needs_weights_that_can_be_read(tmp_path, capsys):
    assert main(["test"]) == 2
    assert "which weights? Give --checkpoint FILE" in capsys.readouterr().err
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK")
    assert main(["test", "--checkpoint", str(broken)]) == 2
    assert "broken.ckpt is not a complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_help_shows_an_example(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"example:\n  freqfusion {command} --c" in text
    assert text.startswith(f"usage: freqfusion {command} ")
    assert "--data.crop_size" in text
    assert "Peak learning rate of all but the backbone" in text


def test_skip_bad_is_short_for_the_setting_of_the_data(monkeypatch):
    from freqfusion.cli._lightning import CommandLine

    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: None)
    assert CommandLine("fit", "", ["--skip-bad"]).config["data.skip_bad"] is True
    assert CommandLine("fit", "", []).config["data.skip_bad"] is False


def test_words_come_over_all_files_wherever_they_stand(tmp_path, monkeypatch):
    from freqfusion.cli._lightning import CommandLine

    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: None)
    first, last = tmp_path / "first.yaml", tmp_path / "last.yaml"
    first.write_text("task: masks\nmodel:\n  lr: 0.5\n  weight_decay: 0.25\n")
    last.write_text("model:\n  lr: 0.125\n")
    line = ["--model.fusion", "carafe", f"--config={first}", "--model.weight_decay=0.75", "-c", str(last)]
    for words in (line, line[2:] + line[:2]):
        command = CommandLine("fit", "", words)
        model = command.config["model"]
        assert (model.fusion, model.weight_decay, model.lr) == ("carafe", 0.75, 0.125)
        assert command.task == "masks"
        assert command.out.parent.name == "last"


def test_numbers_of_batches_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ``typing`` remembers ``Union[float, int]`` of a library, which Lightning's types then become."""
    from freqfusion.cli._lightning import CommandLine

    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: None)
    names = [f"limit_{stage}_batches" for stage in ("train", "val", "test")]
    names += ["overfit_batches", "val_check_interval"]
    types = inspect.unwrap(Trainer.__init__).__annotations__
    for name in names:
        monkeypatch.setitem(types, name, Union[float, int, None])  # noqa: UP007
    words = [word for name in names for word in (f"--trainer.{name}", "1")]
    config = CommandLine("fit", "", ["--data.dataset", "synthetic", *words]).config.as_dict()
    for name in names:
        assert type(config["trainer"][name]) is int, name
