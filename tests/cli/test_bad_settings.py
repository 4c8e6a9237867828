"""Settings that cannot be: each ends with its exit code and one line, and nothing is written."""

import typing

import pytest
import torch
import yaml

from freqfusion._settings import BOUNDS
from freqfusion.cli._arguments import CommandParser, whole_number
from freqfusion.cli._lightning import CommandLine
from freqfusion.cli.main import list_commands, main

TINY = {
    "model": {"network": "fpn_small", "fusion": "bilinear", "lr": 1e-3},
    "data": {
        "dataset_options": {"length": 4, "size": [32, 32]},
        "crop_size": [32, 32],
        "batch_size": 2,
        "workers": 0,
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
}


def refused(capsys, out, argv, code):
    """The one line that a command ends with."""
    assert main([*argv, "--out", str(out)]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"freqfusion {argv[0]}: error: ")
    assert err.count("\n") == 1
    assert not out.exists()
    return err


SEMANTIC = [
    ("--model.class_weights", "[-1, 1, 1, 1, 1, 1, 1, 1]", 2),
    ("--model.class_weights", "[0, 0, 0, 0, 0, 0, 0, 0]", 2),
    ("--model.class_weights", "[.nan, 1, 1, 1, 1, 1, 1, 1]", 2),
    ("--model.class_weights", "[.inf, 1, 1, 1, 1, 1, 1, 1]", 2),
    ("--model.class_weights", "[1, 1]", 2),
    ("--model.weight_decay", "-0.1", 2),
    ("--model.warmup_steps", "-1", 2),
    ("--model.warmup_ratio", "2", 2),
    ("--model.window", "0", 2),
    ("--model.stride", "4", 2),
    ("--model.scales", "[]", 2),
    ("--model.scales", "[0]", 2),
    ("--model.scales", "[.inf]", 2),
    ("--model.scales", "[1e9]", 2),
    ("--model.lr", ".nan", 2),
    ("--model.lr", "0", 2),
    ("--model.lr", "1e38", 2),
    ("--model.backbone_lr_factor", "1e300", 2),
    ("--model.poly_power", "-1", 2),
    ("--model.test_size", "100000", 2),
    ("--model.network_options", "{channels: -8}", 2),
    ("--model.network_options", "{channels: 0}", 2),
    ("--model.network_options", "{colour: 1}", 2),
    ("--data.resize", "[0, 0]", 2),
    ("--data.resize", "[-3, 4]", 2),
    ("--data.crop_size", "[100000, 100000]", 2),
    ("--data.ratio_range", "[2, 1]", 2),
    ("--data.batch_size", "100", 2),
    ("--data.dataset_options", "{colour: 1}", 2),
    ("--data.dataset_options", "{length: -1}", 2),
    ("--data.dataset_options", "{length: null}", 2),
    ("--data.dataset_options", "{size: [100000, 100000]}", 2),
    ("--seed", "-1", 2),
    ("--log_steps", "0", 2),
    ("--checkpoint_steps", "0", 2),
    ("--trainer.max_epoch", "3", 2),
    ("--data.batch", "2", 2),
    ("--ckpt", "x", 2),
    ("--trainer.max_epochs", "-5", 2),
    ("--trainer.max_epochs", "0", 2),
    ("--trainer.max_epochs", "-1", 2),
    ("--trainer.max_steps", "0", 2),
    ("--trainer.max_time", "{hours: -1}", 2),
    ("--trainer.check_val_every_n_epoch", "0", 2),
    ("--trainer.val_check_interval", "100", 2),
    ("--trainer.devices", "0", 2),
    ("--trainer.devices", "many", 2),
    ("--trainer.accelerator", "tpu", 2),
    pytest.param(
        "--trainer.accelerator",
        "gpu",
        2,
        marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
    ),
    ("--trainer.accelerator", "meta", 2),
    ("--trainer.strategy", "nonsense", 2),
]


@pytest.mark.parametrize("option, value, code", SEMANTIC)
def test_fit(tmp_path, capsys, option, value, code):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    assert refused(capsys, tmp_path / "run", ["fit", "--config", str(config), option, value], code)


@pytest.mark.parametrize(
    "task, option, value, code",
    [
        ("detection", "--model.weight_decay", "-1", 2),
        ("detection", "--model.warmup_steps", "-1", 2),
        ("detection", "--model.test_size", "[]", 2),
        ("detection", "--model.test_size", "[100000]", 2),
        ("detection", "--model.milestones", "[-1]", 2),
        ("detection", "--model.gamma", "0", 2),
        ("detection", "--model.lr_batch_size", "0", 2),
        ("detection", "--model.network_options", "{colour: 1}", 2),
        ("detection", "--data.short_sides", "[0]", 2),
        ("detection", "--data.jitter", "[1, 2]", 2),
        ("masks", "--model.milestones", "[2]", 2),
        ("masks", "--model.backbone_lr_factor", "0", 2),
        ("masks", "--model.poly_power", "-1", 2),
        ("masks", "--model.warmup_steps", "-1", 2),
    ],
)
def test_fit_of_other_tasks(tmp_path, capsys, task, option, value, code):
    assert refused(capsys, tmp_path / "run", ["fit", "--task", task, option, value], code)


def test_a_typo_names_the_nearest_option(tmp_path, capsys):
    assert "did you mean --trainer.max_epochs?" in refused(
        capsys, tmp_path / "run", ["fit", "--trainer.max_epoch", "3"], 2
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("null", "is empty"),
        ("- 1", "holds list"),
        ("3", "holds int"),
        ("text", "holds str"),
        ("model: [1, 2]", "model is '[1, 2]'"),
        ("trainer:", "trainer is 'None'"),
        ("[" * 3000 + "]" * 3000, "is not valid YAML"),
        ("model: {lr: ", "is not valid YAML"),
        (
            "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [PLACE]]",
            "is not valid YAML",
        ),
        ("model: !!python/object/apply:os.system ['touch PLACE']", "is not valid YAML"),
        (b"\xff\xfem\x00", "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "compare"])
def test_recipes_of_another_form(tmp_path, capsys, command, content, message):
    config, place = tmp_path / "recipe.yaml", tmp_path / "made"
    data = content if isinstance(content, bytes) else content.replace("PLACE", str(place)).encode()
    config.write_bytes(data)
    argv = [command, "--config", str(config)]
    assert message in refused(capsys, tmp_path / "run", argv, 2)
    assert not place.exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["predict", "", "--checkpoint", "x.ckpt"],
        ["predict", "a.png", "--checkpoint", ""],
        ["predict", "a.png", "--checkpoint", "x.ckpt", "--scales", "inf"],
        ["predict", "a.png", "--checkpoint", "x.ckpt", "--scales", "1e9"],
        ["predict", "a.png", "--checkpoint", "x.ckpt", "--scales", "nan"],
        ["predict", "a.png", "--checkpoint", "x.ckpt", "--scales", "0"],
        ["predict", "a.png", "--checkpoint", "x.ckpt", "--window", "0"],
        ["predict", "a.png", "--checkpoint", "x.ckpt", "--window", "8.5"],
        ["predict", "a.png", "--checkpoint", "x.ckpt", "--sizes", "100000"],
        ["predict", "a.png", "--checkpoint", "x.ckpt", "--score", "nan"],
        ["predict", "a.png", "--check", "x.ckpt"],
        ["analyze", "--checkpoint", "x.ckpt", "--resize", "0", "4"],
        ["analyze", "--checkpoint", "x.ckpt", "--resize", "100000", "100000"],
        ["analyze", "--checkpoint", "x.ckpt", "--limit", "0"],
        ["analyze", "--checkpoint", "x.ckpt", "--lim", "1"],
        ["benchmark", "--rounds", "0"],
        ["benchmark", "--threads", "100000"],
        ["compare", "--preset", "tiny", "--seeds", "1000000000"],
        ["compare", "--preset", "tiny", "--jobs", "0"],
        ["compare", "--preset", "tiny", "--trainer.max_epoch", "3"],
        ["export", "x.ckpt", "--size", "100000x100000"],
        ["export", "x.ckpt", "--size", "0x8"],
        ["export", "x.ckpt", "--size", "8x8", "--dynamic", "-1"],
        ["export", "x.ckpt", "--size", "8x8", "--channels", "-1"],
        ["quickstart", "--minutes", "inf"],
        ["quickstart", "--minutes", "nan"],
        ["quickstart", "--seed", "-1"],
        ["quickstart", "--min", "1"],
        ["quickstart", "--minutes="],
    ],
)
def test_other_commands(tmp_path, capsys, argv):
    refused(capsys, tmp_path / "out", argv, 2)


def numbers_in(annotation):
    """Whether a type has whole numbers or numbers in it."""
    if annotation in (int, float):
        return True
    return any(numbers_in(part) for part in typing.get_args(annotation)) and typing.get_origin(
        annotation
    ) not in (dict, typing.Literal)


EXEMPT = {
    "trainer.max_time": "create_trainer asks the timer that Lightning makes of it",
    "model.num_classes": "comes from the data",
}


@pytest.mark.parametrize("task", ["semantic", "detection", "masks", "features"])
def test_every_number_of_fit_has_bounds(monkeypatch, task):
    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: None)
    line = CommandLine("fit", "", ["--task", task])
    groups = {"trainer": BOUNDS["trainer"], "model": BOUNDS[task], "data": BOUNDS["data"]}
    seen = 0
    for action in line.parser._actions:
        typehint = getattr(action, "_typehint", None) or action.type
        if action.dest in EXEMPT or not numbers_in(typehint):
            continue
        seen += 1
        group, _, name = action.dest.rpartition(".")
        assert name in groups.get(group, BOUNDS["fit"]), action.dest
    assert seen > 35


@pytest.mark.parametrize("command", sorted(set(list_commands()) - {"fit", "test", "validate"}))
def test_every_number_of_the_other_commands_has_bounds(monkeypatch, command):
    parsers = []

    def keep(parser, *_):
        parsers.append(parser)
        raise SystemExit(0)

    monkeypatch.setattr(CommandParser, "parse_known_args", keep)
    assert main([command]) == 0
    for action in parsers[0]._actions:
        if action.type in (int, float, whole_number) and not action.choices:
            assert action.dest in BOUNDS[parsers[0].group]
