"""Run folders, as ``freqfusion fit`` writes them, read and compared: grouped by what differs, ranked, tested."""

import csv
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

from freqfusion.tasks.evaluators import DetectionEvaluator, PanopticEvaluator
from freqfusion.tasks.semantic import BINARY_LABELS, SegmentationModule
from freqfusion.training.callbacks import FACTS, HISTORY
from freqfusion.training.checkpoints import LAST, read_checkpoint, task_of

CONFIG = "config.yaml"
LABELS = {
    **SegmentationModule.metric_labels,
    **BINARY_LABELS,
    **DetectionEvaluator(masks=True).metric_labels,
    **PanopticEvaluator([]).metric_labels,
    "iou": "IoU",
}
"""The metrics of all tasks, for people."""
_FIRST = {"iou": "miou"}
"""The mean of a metric that classes have, where it has another name."""
_ELSEWHERE = {
    *("data.root", "data.cache", "data.seed", "data.workers", "data.eval_batch_size"),
    *("model.num_classes", "model.things", "data.test_split", "trainer.limit_test_batches"),
    *(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy", "default_root_dir")),
    *(f"trainer.{name}" for name in ("logger", "callbacks", "plugins", "profiler", "log_every_n_steps")),
    *(f"trainer.enable_{name}" for name in ("checkpointing", "progress_bar", "model_summary")),
}
"""Settings by which runs of one method may differ: where they ran, and what only a test has to do with."""
_LONG = 60
"""Letters of a name that is made of settings; a longer one gives way to the folder's."""


@dataclass(frozen=True)
class Run:
    """A run: what its folder holds, metrics in percent."""

    folder: Path
    task: str
    settings: Mapping[str, Any]
    """All, as ``model.lr`` and so on."""
    seed: int
    parameters: int
    seconds: float
    """Time of training without validation."""
    step: int | None
    """Of the last validation in training; None where the metrics are of ``freqfusion validate`` or ``test``."""
    metrics: Mapping[str, float | None]
    """None where there was nothing to evaluate."""
    classes: Mapping[str, Mapping[str, float | None]]
    """Metrics per class, by the same names."""
    history: Sequence[Mapping[str, str]]
    """The rows of ``metrics.csv``."""

    @property
    def method_settings(self) -> dict[str, Any]:
        """The settings that make the method: all but the seed and those of the place where it ran."""
        return {key: value for key, value in self.settings.items() if key not in _ELSEWHERE}

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Step and percent of each validation in training."""
        rows = [(row["step"], row.get(f"val_{metric}")) for row in self.history]
        return [(int(float(step)), 100 * float(value)) for step, value in rows if value]


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seeds alone, and how they stand against those of the baseline."""

    name: str
    runs: tuple[Run, ...]
    difference: float | None
    """Mean of the first metric minus the baseline's, over the seeds that both have; None for the baseline."""
    p_value: float | None
    """Of the paired t test over those seeds; None with fewer than two."""

    def values(self, metric: str) -> list[float]:
        """One per seed, without those that had nothing to evaluate."""
        return [value for run in self.runs if (value := run.metrics.get(metric)) is not None]

    def mean(self, metric: str) -> float | None:
        """Over the seeds."""
        return mean(self.values(metric))

    def deviation(self, metric: str) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def seconds(self) -> float:
        """Mean time of training."""
        return statistics.mean(run.seconds for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Methods by the mean of the first metric, best first."""

    methods: tuple[Method, ...]
    baseline: str
    metrics: tuple[str, ...]
    """What all runs were judged by."""
    headline: tuple[str, ...]
    """Those to be shown first; the first of them ranks."""
    split: str
    """``val`` or ``test``."""
    left_out: tuple[str, ...]
    """What is said of runs that are not complete."""

    @property
    def runs(self) -> list[Run]:
        """Of all methods."""
        return [run for method in self.methods for run in method.runs]

    @property
    def differing(self) -> list[str]:
        """The settings in which the methods differ."""
        return _differing([method.runs[0] for method in self.methods])


def mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return statistics.mean(values) if values else None


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file, empty where there is none (files are written whole, so never half of one)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds {type(content).__name__}, expected names with values")
    return content


def read_history(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``; none where there is no such file."""
    try:
        with (folder / HISTORY).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def find_headline(classes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The two metrics to be shown first, of the metrics of each class."""
    columns = [name for name in next(iter(classes.values()), {}) if "50" not in name]
    return [_FIRST.get(name, name) for name in columns][:2]


def is_complete(folder: Path, split: str = "val") -> bool:
    """Whether a run has come to its end and was judged there, or was judged afterwards."""
    facts, results = read_json(folder / FACTS), read_json(folder / f"{split}_metrics.json")
    return bool(facts and results) and results.get("step", facts.get("steps")) == facts.get("steps")


def read_run(folder: Path, split: str = "val") -> Run:
    """The run in a folder.

    Args:
        folder: of ``freqfusion fit``.
        split: whose metrics: ``val`` or ``test``.

    Raises:
        ValueError: for a folder that holds no run, was not judged on the split, or is damaged.
    """
    facts, results = read_json(folder / FACTS), read_json(folder / f"{split}_metrics.json")
    if not facts:
        below = sorted(path.parent for path in folder.rglob(FACTS))[:3]
        hint = f"; name the runs below it, such as {' '.join(map(str, below))}" if below else ""
        raise ValueError(f"{folder} is no run: it has no {FACTS}, which freqfusion fit writes{hint}")
    if not results:
        mend = (
            f"judge it with freqfusion test --checkpoint {folder / LAST}"
            if split == "test"
            else f"let it go on to a validation with freqfusion fit --resume --out {folder}"
        )
        raise ValueError(f"{folder} has no {split}_metrics.json: {mend}, or leave it out")
    content = _read_settings(folder)
    if "classes" not in results and content.get("task") == "features":
        raise ValueError(
            f"{folder} is a run of the task features, whose figures are not of classes: leave it out"
        )
    try:
        settings = {
            f"{group}.{name}": value
            for group in ("model", "data", "trainer")
            for name, value in dict(content.get(group) or {}).items()
        }
        history = read_history(folder)
        names = {name for entry in results["classes"].values() for name in entry}
        return Run(
            folder,
            str(content.get("task", SegmentationModule.task)),
            settings,
            int(content["seed_everything"]),
            int(facts["parameters"]),
            float(history[-1]["seconds"]),
            results.get("step"),
            {name: _percent(value) for name, value in results.items() if name in LABELS.keys() - {"loss"}},
            {
                label: {name: _percent(entry[name]) for name in entry if name in names}
                for label, entry in results["classes"].items()
            },
            history,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({error!r}): copy it again") from error


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * float(value)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Those of ``config.yaml``, or of the checkpoint of a run that was started from Python."""
    path = folder / CONFIG
    if not path.is_file():
        content = read_checkpoint(folder / LAST)
        data = content.get("datamodule_hyper_parameters", {})
        if "seed" not in data:
            raise ValueError(
                f"{folder} says nothing of its data, neither in {CONFIG} nor in {LAST}: leave it out"
            )
        model = content["hyper_parameters"] | content.get("asked", {})
        parts = {"model": model, "data": data, "seed_everything": data["seed"]}
        return {"task": task_of(content), **parts}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (RecursionError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}): copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds {type(content).__name__}, expected settings")
    return content


def compare_runs(
    folders: Iterable[Path], split: str = "val", baseline: str | None = None, root: str | None = None
) -> Comparison:
    """Read runs, group them into methods and rank these.

    Args:
        folders: of the runs; one that is not complete is left out, and the result says so.
        split: whose metrics: ``val`` for the last validation in training, ``test`` for ``freqfusion test``.
        baseline: the method that others are held against; the leader if not given.
        root: folder of the data, where the runs name several for the same data.

    Raises:
        ValueError: for runs that cannot be compared: the message says why.
    """
    unique = {folder.resolve(): folder for folder in folders}
    runs, left_out = [], []
    for folder in unique.values():
        run = read_run(folder, split)
        if is_complete(folder, split):
            runs.append(run)
        else:
            steps = read_json(folder / FACTS)["steps"]
            left_out.append(
                f"{folder} is left out: its last validation is that of step {run.step} of {steps}; "
                f"freqfusion fit --resume --out {folder} goes on with it"
            )
    if not runs:
        raise ValueError(f"there is no complete run to compare{''.join(f'; {line}' for line in left_out)}")
    _check_alike(runs, split, root)
    metrics = [name for name in LABELS if all(name in run.metrics for run in runs)]
    headline = [name for name in find_headline(runs[0].classes) if name in metrics]
    if not headline:
        first = runs[0]
        raise ValueError(f"the runs have no metric in common; {first.folder} has {', '.join(first.metrics)}")
    groups = group_runs(runs)
    means = {
        name: mean([score for run in group if (score := run.metrics[headline[0]]) is not None])
        for name, group in groups.items()
    }
    order = sorted(groups, key=lambda name: -1.0 if (score := means[name]) is None else score, reverse=True)
    baseline = order[0] if baseline is None else baseline
    if baseline not in groups:
        raise ValueError(f"there is no method {baseline!r} among the runs; choose from: {', '.join(order)}")
    methods = tuple(_against(name, groups[name], groups[baseline], headline[0]) for name in order)
    return Comparison(methods, baseline, tuple(metrics), tuple(headline), split, tuple(left_out))


def _against(name: str, runs: Sequence[Run], baseline: Sequence[Run], metric: str) -> Method:
    """A method, held against the baseline seed by seed."""
    reference = {} if runs is baseline else {run.seed: run.metrics[metric] for run in baseline}
    differences = [
        own - other
        for run in runs
        if (own := run.metrics[metric]) is not None and (other := reference.get(run.seed)) is not None
    ]
    return Method(name, tuple(runs), mean(differences), paired_p_value(differences))


def _check_alike(runs: Sequence[Run], split: str, root: str | None) -> None:
    """Refuse runs whose metrics say nothing of each other."""
    first = runs[0]
    limit = f"trainer.limit_{split}_batches"
    keys = ["data.dataset", "data.dataset_options", f"data.{split}_split", "data.resize", limit]
    keys += ["model.boundary_width", "model.max_detections"]
    keys += [] if root else ["data.root"]
    keys += ["data.eval_batch_size"] if isinstance(first.settings.get(limit), int) else []
    for run in runs[1:]:
        pairs: dict[str, tuple[Any, Any]] = {"task": (first.task, run.task)}
        pairs |= {key: (first.settings.get(key), run.settings.get(key)) for key in keys}
        pairs["classes"] = (list(first.classes), list(run.classes))
        for key, (one, other) in pairs.items():
            if _text(one) != _text(other):
                mend = "; if both are the same data, say where it is with --data.root FOLDER"
                raise ValueError(
                    f"{first.folder} and {run.folder} cannot be compared, for they were not judged on the same: "
                    f"{key} is {_text(one)} and {_text(other)}{mend if key == 'data.root' else ''}"
                )
        if (first.step is None) != (run.step is None):
            before, after = (first, run) if first.step is None else (run, first)
            raise ValueError(
                f"the metrics of {before.folder} are of freqfusion validate, those of {after.folder} of the last "
                "validation in training: judge all runs by freqfusion validate (or all by freqfusion test, and add "
                "--split test)"
            )


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by method; a method's name says in what it differs from the others, the fusion at least.

    Raises:
        ValueError: for two runs of one method with the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_text(run.method_settings), []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: run.seed)
        for one, other in pairwise(group):
            if one.seed == other.seed:
                raise ValueError(
                    f"{one.folder} and {other.folder} are the same run twice, with the same settings and the seed "
                    f"{one.seed}: leave one out"
                )
    return dict(zip(_names([group[0] for group in groups.values()]), groups.values(), strict=True))


def _names(runs: Sequence[Run]) -> list[str]:
    """For each run of another method a name of its own, from the settings that differ or else from its folder."""
    differing = _differing(runs)
    keys = [key for key in ("model.network", "model.fusion") if key in differing] or ["model.fusion"]
    names = [", ".join(str(run.settings.get(key)) for key in keys) for run in runs]
    full = []
    for run, name in zip(runs, names, strict=True):
        alike = [other for other, same in zip(runs, names, strict=True) if same == name]
        extra = [f"{key.partition('.')[2]} {_text(run.settings.get(key))}" for key in _differing(alike)]
        full.append(", ".join([name, *extra]))
    if max(map(len, full)) <= _LONG:
        return full
    common = os.path.commonpath([run.folder.resolve().parent for run in runs])
    return [run.folder.resolve().relative_to(common).as_posix() for run in runs]


def _differing(runs: Sequence[Run]) -> list[str]:
    settings = [run.method_settings for run in runs]
    keys = dict.fromkeys(key for entry in settings for key in entry)
    return [key for key in keys if len({_text(entry.get(key)) for entry in settings}) > 1]


def _text(value: Any) -> str:
    """A setting in one form, whether it was read from YAML or from a checkpoint."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p value of the paired t test: how often pairs without a true difference differ this much.

    Args:
        differences: one per pair; fewer than two give None.

    >>> paired_p_value([1.0]) is None, round(paired_p_value([1.0, 2.0, 3.0]), 4)
    (True, 0.0742)
    """
    if len(differences) < 2:
        return None
    if len(set(differences)) == 1:  # no spread: scipy would warn
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)
