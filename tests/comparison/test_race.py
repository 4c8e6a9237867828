"""The race: what counts as done, who leads, how sure that is, and how runs are started."""

import json
import math
import sys

import pytest
import torch

from freqfusion.comparison import race
from freqfusion.comparison.race import Job, Outcome, Slot, collect, make_slots, paired_p_value, rank, run_jobs


def outcome(method, seed, miou, boundary=20.0):
    return Outcome(method, seed, None, 10, 5.0, miou, boundary, {}, [])


def write_run(folder, *, steps=40, judged=40, miou=0.5):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"steps": steps, "parameters": 7}))
    results = {
        "step": judged,
        "miou": miou,
        "boundary_iou": 0.25,
        "classes": {"sky": {"iou": 0.5, "boundary_iou": None}},
    }
    (folder / "val_metrics.json").write_text(json.dumps(results))
    (folder / "metrics.csv").write_text(
        "step,epoch,seconds,val_miou,val_boundary_iou\n20,0,1.5,,\n" + f"{judged},1,3.5,{miou},0.25\n"
    )


def test_slots_share_cores_and_devices():
    assert make_slots(3, cores=16, devices=2) == [Slot(5, 0), Slot(5, 1), Slot(5, 0)]
    assert make_slots(None, cores=16, devices=4) == [Slot(4, index) for index in range(4)]
    assert make_slots(8, cores=2, devices=0) == [Slot(1, None)] * 8


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


def test_rank_pairs_by_seed():
    runs = [
        outcome("a", 0, 50.0),
        outcome("b", 1, 53.0),
        outcome("b", 0, 51.0),
        outcome("a", 2, 40.0),
        outcome("a", 1, 51.0),
    ]
    first, second = rank(runs)
    assert (first.method, first.mean("miou"), first.difference, first.p_value) == ("b", 52.0, None, None)
    assert first.spread("miou") == pytest.approx(math.sqrt(2))
    assert [run.seed for run in second.outcomes] == [0, 1, 2]
    assert second.difference == pytest.approx(-1.5)  # seeds 0 and 1; seed 2 has no partner
    assert second.p_value == pytest.approx(paired_p_value([-1.0, -2.0]))


def test_single_seeds_have_neither_spread_nor_p_value():
    _, second = rank([outcome("a", 0, 50.0), outcome("b", 0, 49.0)])
    assert (second.spread("miou"), second.p_value, second.difference) == (None, None, -1.0)


def test_collect_takes_complete_runs_only(tmp_path):
    write_run(tmp_path / "carafe" / "seed_0")
    write_run(tmp_path / "carafe" / "seed_1", judged=20)
    (tmp_path / "bilinear" / "seed_0").mkdir(parents=True)
    (run,) = collect(tmp_path)
    assert (run.method, run.seed, run.parameters, run.seconds) == ("carafe", 0, 7, 3.5)
    assert (run.miou, run.boundary_iou, run.curve) == (50.0, 25.0, [(40, 50.0, 25.0)])


def test_runs_fail_alone_and_done_ones_are_kept(tmp_path, monkeypatch):
    """Three runs: one done before, one that ends well, one that fails."""
    jobs = [race.job_of(tmp_path, name, 0) for name in ("done", "good", "bad")]
    write_run(jobs[0].folder)
    write_run(tmp_path / "ready", miou=0.75)
    script = (
        "import os, shutil, sys; folder = sys.argv[sys.argv.index('--out') + 1]\n"
        "assert os.environ['OMP_NUM_THREADS'] == '3'\n"
        "if 'bad' in folder: print('first'); print('it broke'); sys.exit(1)\n"
        f"shutil.copytree({str(tmp_path / 'ready')!r}, folder, dirs_exist_ok=True)\n"
    )
    original = race.subprocess.Popen

    def popen(command, **options):
        assert command[:4] == [sys.executable, "-m", "freqfusion", "fit"]
        assert command[-1] == "--resume"
        return original([sys.executable, "-c", script, *command[4:]], **options)

    monkeypatch.setattr(race.subprocess, "Popen", popen)
    seen = []
    run_jobs(jobs, [Slot(3, None)], ["--config", "x.yaml"], lambda: seen.append([job.state for job in jobs]))
    assert [job.state for job in jobs] == ["done", "done", "failed"]
    assert ["done", "running", "waiting"] in seen  # one slot: one at a time
    assert race.why_failed(jobs[2]) == "it broke"
    assert jobs[1].scores() == (75.0, 25.0)
    assert jobs[0].process is None


def test_a_run_that_ends_without_validation_is_told(tmp_path):
    job = Job("carafe", 0, tmp_path / "run", process=type("Ended", (), {"poll": lambda self: 0})())
    write_run(job.folder, judged=20)
    (job.folder / "log.txt").write_text("fine\n")
    assert not job.is_done()
    assert "last judged at step 20" in race.why_failed(job)


def test_stopping_ends_the_runs(tmp_path, monkeypatch):
    original = race.subprocess.Popen
    monkeypatch.setattr(
        race.subprocess,
        "Popen",
        lambda command, **options: original([sys.executable, "-c", "import time; time.sleep(60)"], **options),
    )
    job = race.job_of(tmp_path, "bilinear", 0)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], [Slot(1, None)], [], stop)
    assert job.process.returncode is not None


def test_thin_parts():
    from freqfusion.comparison.race_page import thin_parts

    mask = torch.zeros(20, 20, dtype=torch.uint8)
    mask[:, 9:11] = 1  # a pole
    mask[2:9, 12:19] = 2  # a block
    mask[15:, :5] = 255
    thin = thin_parts(mask)
    assert bool(thin[:, 9:11].all())
    assert not bool(thin[2:9, 12:19].any())
    assert not bool(thin[:13, :8].any())
    assert bool(thin[16:, 5:9].all())  # ground pressed between the pole and what is not judged
    assert not bool(thin[mask == 255].any())
