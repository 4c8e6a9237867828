"""Run folders: what is read, what is one method, who leads, how sure that is, and what is refused."""

import json
import math

import pytest

from freqfusion.comparison import runs
from freqfusion.comparison.runs import compare_runs, paired_p_value, read_run
from run_folders import write_run


def names(comparison):
    return [method.name for method in comparison.methods]


@pytest.mark.parametrize(
    "degrees, t",
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (10, 2.22814), (11, 2.20099)],
)
def test_p_value_agrees_with_the_table_of_student(degrees, t):
    """Values of t that are passed by chance in 5 of 100 cases, from the usual table."""
    pairs = [1.0, -1.0] * ((degrees + 1) // 2) + [0.0] * ((degrees + 1) % 2)
    scale = math.sqrt(sum(value**2 for value in pairs) / degrees)  # standard deviation of the pairs
    mean = t * scale / math.sqrt(degrees + 1)
    assert paired_p_value([mean + value for value in pairs]) == pytest.approx(0.05, abs=1e-5)


def test_p_value_of_equal_pairs():
    assert paired_p_value([0.0, 0.0]) == 1.0
    assert paired_p_value([0.5, 0.5]) == 0.0
    assert paired_p_value([]) is None


def test_a_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "run", seed=3))
    assert (run.task, run.seed, run.parameters, run.seconds, run.step) == ("semantic", 3, 7, 3.5, 40)
    assert run.metrics == {"miou": 50.0, "boundary_iou": 25.0}
    assert run.classes["sea"] == {"iou": None, "boundary_iou": None}
    assert run.curve("miou") == [(20, 12.5), (40, 50.0)]


def test_methods_are_ranked_and_paired_by_seed(tmp_path):
    scores = {("a", 0): 50.0, ("b", 1): 53.0, ("b", 0): 51.0, ("a", 2): 40.0, ("a", 1): 51.0}
    folders = [
        write_run(tmp_path / f"{name}{seed}", name, seed, score / 100)
        for (name, seed), score in scores.items()
    ]
    comparison = compare_runs(folders)
    first, second = comparison.methods
    assert (first.name, first.mean("miou"), first.difference, first.p_value) == ("b", 52.0, None, None)
    assert first.deviation("miou") == pytest.approx(math.sqrt(2))
    assert [run.seed for run in second.runs] == [0, 1, 2]
    assert second.difference == pytest.approx(-1.5)  # seeds 0 and 1; seed 2 has no partner
    assert second.p_value == pytest.approx(paired_p_value([-1.0, -2.0]))
    assert (comparison.baseline, comparison.headline) == ("b", ("miou", "boundary_iou"))
    held = compare_runs(folders, baseline="a").methods
    assert [method.difference for method in held] == [pytest.approx(1.5), None]
    with pytest.raises(ValueError, match="there is no method 'c' among the runs; choose from: b, a"):
        compare_runs(folders, baseline="c")


def test_single_seeds_have_neither_deviation_nor_p_value(tmp_path):
    folders = [write_run(tmp_path / name, name, miou=score) for name, score in (("a", 0.5), ("b", 0.49))]
    second = compare_runs(folders).methods[1]
    assert (second.deviation("miou"), second.p_value) == (None, None)
    assert second.difference == pytest.approx(-1.0)


def test_one_run_alone_and_twice(tmp_path):
    run = write_run(tmp_path / "run")
    (method,) = compare_runs([run, tmp_path / "." / "run"]).methods
    assert (method.name, len(method.runs), method.difference) == ("freqfusion", 1, None)


def test_methods_are_named_by_what_differs(tmp_path):
    def compared(*settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folders = [write_run(folder / f"recipe{i}" / "run", **entry) for i, entry in enumerate(settings)]
        comparison = compare_runs(folders)
        return sorted(names(comparison)), comparison.differing

    assert compared({"fusion": "a"}, {"fusion": "b"}) == (["a", "b"], ["model.fusion"])
    net = {"model__network": "segnext_t"}
    assert compared({}, net) == (["fpn_small", "segnext_t"], ["model.network"])
    assert compared({"fusion": "a"}, {"fusion": "b", **net})[0] == ["fpn_small, a", "segnext_t, b"]
    assert compared({}, {"model__lr": 0.2})[0] == ["freqfusion, lr 0.1", "freqfusion, lr 0.2"]
    # what tells some apart is not told of the others
    assert compared({"fusion": "a"}, {"model__lr": 0.2}, {"model__lr": 0.3})[0][0] == "a"
    long = {"model__network_options": {"weights": "w" * 80}}
    assert compared({}, long)[0] == ["recipe0/run", "recipe1/run"]
    # where a run was made says nothing of the method
    places = {"trainer__accelerator": "cpu", "data__workers": 3, "seed": 1}
    assert compared({}, places) == (["freqfusion"], [])


def test_other_metrics_lead_in_other_tasks(tmp_path):
    scores = {"mask_ap": 0.3, "mask_ap50": 0.6, "box_ap": 0.4}
    run = write_run(tmp_path / "run", task="detection", metrics=scores)
    assert compare_runs([run]).headline == ("mask_ap", "box_ap")


def test_a_metric_that_was_not_defined_ranks_last(tmp_path):
    folders = [write_run(tmp_path / name, name, miou=score) for name, score in (("a", None), ("b", 0.0))]
    comparison = compare_runs(folders)
    assert names(comparison) == ["b", "a"]
    assert (comparison.methods[1].mean("miou"), comparison.methods[1].difference) == (None, None)


def test_runs_that_are_not_complete_are_left_out(tmp_path):
    folders = [write_run(tmp_path / "a", "a"), write_run(tmp_path / "b", "b", judged=20)]
    comparison = compare_runs(folders)
    assert names(comparison) == ["a"]
    (line,) = comparison.left_out
    assert line.startswith(f"{tmp_path / 'b'} is left out: its last validation is that of step 20 of 40")
    with pytest.raises(ValueError, match=r"there is no complete run to compare; .*b is left out"):
        compare_runs(folders[1:])


def test_metrics_of_the_test_split(tmp_path):
    folders = [write_run(tmp_path / name, name) for name in "ab"]
    for folder, score in zip(folders, (0.1, 0.2), strict=True):
        content = {"miou": score, "classes": {"sky": {"iou": score}}}
        (folder / "test_metrics.json").write_text(json.dumps(content))
    comparison = compare_runs(folders, "test")
    assert [(method.name, method.mean("miou")) for method in comparison.methods] == [("b", 20.0), ("a", 10.0)]
    (folders[0] / "test_metrics.json").unlink()
    with pytest.raises(
        ValueError, match=r"a has no test_metrics.json: judge it with freqfusion test --checkpoint"
    ):
        compare_runs(folders, "test")


DETECTION = {"task": "detection", "metrics": {"box_ap": 0.5}}


@pytest.mark.parametrize(
    "settings, message",
    [
        (DETECTION, "task is semantic and detection"),
        ({"data__dataset": "camvid"}, "data.dataset is synthetic and camvid"),
        ({"data__dataset_options": {"length": 9}}, 'data.dataset_options is {"length": 8} and {"length": 9}'),
        ({"data__val_split": "test"}, "data.val_split is val and test"),
        ({"data__root": "elsewhere"}, "say where it is with --data.root FOLDER"),
        ({"data__eval_batch_size": 4}, "data.eval_batch_size is null and 4"),
        ({"data__resize": [8, 8]}, r"data.resize is null and \[8, 8\]"),
        ({"model__boundary_width": 3}, "model.boundary_width is 2 and 3"),
        ({"trainer__limit_val_batches": 4}, "trainer.limit_val_batches is 3 and 4"),
        ({"judged": None}, "are of freqfusion validate, those of .*a of the last validation in training"),
        ({"fusion": "a"}, "are the same run twice, with the same settings and the seed 0"),
        ({"metrics": {"miou": 0.5, "boundary_iou": 0.5, "dice": 0.5}}, None),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, settings, message):
    folders = [write_run(tmp_path / "a", "a"), write_run(tmp_path / "b", **{"fusion": "b", **settings})]
    if message is None:  # what only one has is left aside
        assert compare_runs(folders).metrics == ("miou", "boundary_iou")
        return
    with pytest.raises(ValueError, match=message):
        compare_runs(folders)


def test_the_same_data_in_another_place(tmp_path):
    folders = [write_run(tmp_path / name, name, data__root=f"/{name}") for name in "ab"]
    assert len(compare_runs(folders, root="/here").methods) == 2


def test_other_classes_are_other_data(tmp_path):
    folders = [write_run(tmp_path / name, name) for name in "ab"]
    path = folders[1] / "val_metrics.json"
    path.write_text(path.read_text().replace("sky", "cloud"))
    with pytest.raises(ValueError, match=r'classes is \["sky", "sea"\] and \["cloud", "sea"\]'):
        compare_runs(folders)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no run: it has no run.json"):
        read_run(tmp_path / "nowhere")
    write_run(tmp_path / "race" / "a" / "seed_0")
    with pytest.raises(ValueError, match=r"race is no run: .*; name the runs below it, such as .*a/seed_0"):
        read_run(tmp_path / "race")


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", "{"),
        ("run.json", "[1]"),
        ("run.json", "{}x"),
        ("val_metrics.json", '{"step": 40}'),
        ("val_metrics.json", '{"step": 40, "classes": [1]}'),
        ("val_metrics.json", '{"step": 40, "miou": "high", "classes": {}}'),
        ("config.yaml", "model: ["),
        ("config.yaml", "3"),
        ("config.yaml", "seed_everything: one"),
        ("config.yaml", "model: 3"),
        ("metrics.csv", ""),
        ("metrics.csv", "step\n1\n"),
        ("metrics.csv", "step,seconds\n1,soon\n"),
    ],
)
def test_damaged_runs(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"run.* is damaged"):
        read_run(folder)


def test_settings_of_a_run_from_python_need_a_checkpoint(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*last.ckpt"):
        read_run(folder)


def test_a_run_from_python_without_a_data_module_is_told(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    monkeypatch.setattr(runs, "read_checkpoint", lambda path: {"hyper_parameters": {"lr": 0.1}})
    with pytest.raises(ValueError, match="run says nothing of its data"):
        read_run(folder)
