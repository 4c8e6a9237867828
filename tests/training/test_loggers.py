"""What loggers are given, read back from what they wrote; nothing here reaches a network."""

import csv
import io
import json
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from PIL import Image
from torch import Tensor

from freqfusion.cli.main import main
from freqfusion.data import BadSampleError
from freqfusion.drawing.figures import colour_mask
from freqfusion.tasks.pictures import GAP, read_sample
from freqfusion.training import create_trainer
from freqfusion.training.loggers import create_loggers
from tiny_objects import tiny_detection, write_coco
from tiny_training import read_history, run_script, tiny_data, tiny_fit

pytestmark = pytest.mark.usefixtures("tiny_networks")
PICTURES = {f"image_truth_prediction/{n} val-{i:06}" for n, i in enumerate((3, 11, 18))}
"""Of 22 images, by number and name."""
WIDTH = 3 * 32 + 2 * GAP


def read_events(folder: Path) -> Any:
    """All that TensorBoard shows of a folder."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def rows_of(events: Any) -> dict[int, dict[str, float]]:
    """Its figures by step."""
    rows: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {})[tag] = event.value
    return rows


def check_rows(logged: dict[int, dict[str, float]], folder: Path) -> None:
    """The figures of the run's own files, and no others."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(logged) == [int(row["step"]) for row in rows]
    for row in rows:
        figures = dict(logged[int(row.pop("step"))])
        classes = {name: figures.pop(name) for name in list(figures) if "_per_class/" in name}
        assert figures == pytest.approx({name: float(x) for name, x in row.items() if x}, rel=1e-6)
        assert bool(classes) == ("val_miou" in figures)
    last = json.loads((folder / "val_metrics.json").read_text())["classes"]
    assert classes == pytest.approx(
        {
            f"val_{figure}_per_class/{name}": x
            for name, values in last.items()
            for figure, x in values.items()
            if x is not None
        },
        rel=1e-6,
    )


def fit_and_resume(out: Path, end: Callable[[], None] = lambda: None, **options: Any) -> dict[str, Tensor]:
    """The weights after two epochs, with a stop between them."""
    for epochs, resume in ((1, None), (2, out / "last.ckpt")):
        weights, _ = tiny_fit(out, "noisy", max_epochs=epochs, resume=resume, **options)
        end()  # as at the end of a process
    return weights


def check_hyperparameters(found: dict[str, Any]) -> None:
    expected = {"network": "noisy", "fusion": "freqfusion", "dataset": "synthetic", "seed": "0", "lr": "0.1"}
    expected |= {
        "steps": "10",
        "warmup_steps": "2",
        "dataset_options/length": "22",
        "network_options": "None",
    }
    assert {name: str(found.get(name)).removesuffix(".0") for name in expected} == expected


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logged, _ = tiny_fit(tmp_path / "a", "noisy", max_epochs=2, logger="tensorboard", log_steps=2)
    state = torch.get_rng_state()
    plain, _ = tiny_fit(tmp_path / "b", "noisy", max_epochs=2, log_steps=2)
    assert all(torch.equal(logged[name], x) for name, x in plain.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert read_history(tmp_path / "a") == read_history(tmp_path / "b")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "tensorboard",
        *(path.name for path in (tmp_path / "b").iterdir()),
    }

    events = read_events(tmp_path / "a" / "tensorboard")
    check_rows(rows_of(events), tmp_path / "a")
    assert {*events.Tags()["images"]} == PICTURES
    data = tiny_data()
    for index, name in zip((3, 11, 18), sorted(PICTURES), strict=True):
        shown = events.Images(name)
        assert [event.step for event in shown] == [5, 10]
        picture = np.asarray(Image.open(io.BytesIO(shown[-1].encoded_image_string)))
        sample = read_sample(data, "val", index)
        assert picture.shape == (24, WIDTH, 3)
        assert (picture[:, 32 + GAP : 64 + GAP] == colour_mask(sample["mask"].numpy(), data.palette)).all()

    from tensorboard.plugins.hparams import plugin_data_pb2

    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    check_hyperparameters({name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()})


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """In TensorBoard's folder; a CSV of Lightning's begins another version, the run's own goes on."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "a run"
    fit_and_resume(out, logger=["tensorboard", "csv"])
    events = read_events(out / "tensorboard")
    assert sorted(rows_of(events)) == [*range(1, 11)]
    assert [event.step for event in events.Images(min(PICTURES))] == [5, 10]
    assert len(read_history(out)) == 10
    for version, steps in enumerate((range(1, 6), range(6, 11))):
        with (out / "csv" / f"version_{version}" / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows if row["train_loss"]] == [*steps]
        assert [int(row["step"]) for row in rows if row["val_iou_per_class/ground"]] == [steps[-1]]
        assert "network: noisy" in (out / "csv" / f"version_{version}" / "hparams.yaml").read_text()


def test_a_loss_that_is_accumulated_and_a_sanity_check(tmp_path: Path) -> None:
    """Steps are those of the optimizer; what is judged before training is not logged."""
    pytest.importorskip("tensorboard")
    options = {"accumulate_grad_batches": 2, "num_sanity_val_steps": 2}
    tiny_fit(tmp_path, "plain", max_epochs=2, logger="tensorboard", **options)
    events = read_events(tmp_path / "tensorboard")
    check_rows(rows_of(events), tmp_path)
    assert [event.step for event in events.Images(min(PICTURES))] == [3, 6]


def test_objects(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    module, data = tiny_detection(write_coco(tmp_path / "data"), data={"short_sides": [64]})
    trainer = create_trainer(
        tmp_path / "run", max_steps=1, logger="tensorboard", accelerator="cpu", enable_progress_bar=False
    )
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    events = read_events(tmp_path / "run" / "tensorboard")
    assert {"val_mask_ap", "val_mask_ap_per_class/disc", "test_box_ap50", "test_box_ap_per_class/block"} <= {
        *events.Tags()["scalars"]
    }
    names = [f"image_truth_prediction/{n} train_{i}" for n, i in enumerate((0, 2, 3))]
    assert events.Tags()["images"] == names
    assert [events.Images(name)[0].width for name in names] == [3 * width + 2 * GAP for width in (80, 80, 64)]


def test_shards_of_two_processes_write_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_script("logged", tmp_path)
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1
    events = read_events(tmp_path / "tensorboard")
    check_rows(rows_of(events), tmp_path)
    assert [event.step for event in events.Images(events.Tags()["images"][0])] == [2, 4]
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["version_0"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and class paths; the settings are kept in the run folder, wherever the logger writes."""
    out = tmp_path / "run"
    words = ["--data.dataset", "synthetic", "--data.dataset_options", '{"length": 8, "size": [24, 32]}']
    words += ["--data.crop_size", "16x24", "--data.batch_size", "4", "--data.workers", "0"]
    words += ["--model.network", "plain", "--trainer.accelerator", "cpu", "--out", str(out)]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.max_steps"]
    assert main(["fit", *words, "1", "--trainer.logger", "[csv]"]) == 0
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "mine")}}
    more = ["2", "--resume", "--trainer.logger", json.dumps(logger)]
    assert main(["fit", *words, *more]) == 0
    assert "mine" in (out / "config.yaml").read_text()
    assert len(read_history(out)) == 2
    capsys.readouterr()
    for wrong in ("tensorbord", "[csv,tensorbord]"):
        assert main(["fit", *words, "3", "--resume", "--trainer.logger", wrong]) == 2
        assert "unknown logger 'tensorbord'; choose one of tensorboard, wandb," in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_an_absent_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'python -m pip install "freqfusion\[{name}\]"'):
        create_trainer(tmp_path / "run", logger=name)
    assert not (tmp_path / "run").exists()


def test_what_is_no_name_stays(tmp_path: Path) -> None:
    own = CSVLogger(tmp_path)
    assert [create_loggers(given, tmp_path) for given in (None, True, False, own)] == [
        None,
        True,
        False,
        [own],
    ]
    assert create_trainer(tmp_path, logger=[own], enable_progress_bar=False).loggers == [own]


class Counting(Logger):
    """A logger of the user's own, of a kind that is not known."""

    name, version = "counting", 0  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps.append(step)

    def log_hyperparams(self, params: Any, *args: Any, **options: Any) -> None:
        assert params


def test_a_logger_of_an_unknown_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the figures; nothing is drawn that nobody shows."""
    monkeypatch.setattr("freqfusion.training.loggers.draw_side_by_side", None)
    logger = Counting()
    tiny_fit(tmp_path, "plain", max_epochs=1, logger=logger)
    assert logger.steps == [1, 2, 3, 4, 5, 5]


def test_an_image_that_is_bad_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")

    def read(data: Any, split: str, index: int) -> dict[str, Any]:
        if index == 11:
            raise BadSampleError("cut off")
        return read_sample(data, split, index)

    monkeypatch.setattr("freqfusion.training.loggers.read_sample", read)
    tiny_fit(tmp_path, "plain", max_epochs=1, logger="tensorboard")
    shown = read_events(tmp_path / "tensorboard").Tags()["images"]
    assert {*shown} == {name for name in PICTURES if "/1 " not in name}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Servers and proxy of all kinds are one of this test; the list holds who has connected to it."""
    callers: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:
                    return
                callers.append((address, connection.recv(200)))
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "WANDB_BASE_URL"):
            monkeypatch.setenv(name, place)
        for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        socket.create_connection(server.getsockname()).close()  # it does notice
        while not callers:
            pass
        callers.clear()
        yield callers


@pytest.mark.loggers
def test_mlflow(tmp_path: Path, no_network: list[Any]) -> None:
    mlflow = pytest.importorskip("mlflow")
    out = tmp_path / "a run"
    logged = fit_and_resume(out, logger="mlflow")
    plain = fit_and_resume(tmp_path / "plain")
    assert all(torch.equal(logged[name], x) for name, x in plain.items())

    client = mlflow.MlflowClient(f"sqlite:///{out / 'mlflow' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'freqfusion'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == str(out)
    rows: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            rows.setdefault(metric.step, {})[name] = metric.value
    check_rows(rows, out)
    check_hyperparameters({**run.data.params, "steps": "10"})
    assert run.data.params["steps"] == "5"  # mlflow keeps what it was told first
    entries = [entry.path for entry in client.list_artifacts(run.info.run_id, "images")]
    pictures = [path for path in entries if path.endswith(".png")]  # beside each a smaller one
    assert len(pictures) == 2 * len(PICTURES)
    picture = Image.open(client.download_artifacts(run.info.run_id, min(pictures), str(tmp_path)))
    assert picture.size == (WIDTH, 24)
    assert not no_network


@pytest.mark.loggers
def test_wandb(tmp_path: Path, no_network: list[Any]) -> None:
    wandb = pytest.importorskip("wandb")
    out = tmp_path / "a run"
    logged = fit_and_resume(out, wandb.finish, logger="wandb")
    plain = fit_and_resume(tmp_path / "plain")
    assert all(torch.equal(logged[name], x) for name, x in plain.items())

    first, second = sorted((out / "wandb").glob("offline-run-*"))
    identity = json.loads((out / "loggers.json").read_text())["wandb"]
    rows: dict[int, dict[str, float]] = {}
    config: dict[str, Any] = {}
    shown = set()
    for folder in (first, second):
        for record in read_records(folder / f"run-{identity}.wandb"):
            entries = {".".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
            config |= {".".join(x.nested_key) or x.key: x.value_json for x in record.run.config.update}
            config |= {".".join(x.nested_key) or x.key: x.value_json for x in record.config.update}
            step = entries.get("trainer/global_step")
            for name, x in entries.items():
                if name.endswith(".filenames"):
                    assert [Image.open(folder / "files" / path).size for path in x] == [(WIDTH, 24)]
                    shown.add((name.removesuffix(".filenames"), step))
                elif not name.startswith(("_", "trainer/", "image_truth_prediction")):
                    rows.setdefault(step, {})[name] = x
    check_rows(rows, out)
    assert shown == {(name, step) for name in PICTURES for step in (5, 10)}
    config = {name: json.loads(x) for name, x in config.items()}
    check_hyperparameters({**config, "dataset_options/length": config["dataset_options"]["length"]})
    assert not no_network


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file of wandb's: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if place // 32768 != (place + 6) // 32768:  # no header crosses the border of a block
            place = (place // 32768 + 1) * 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""
