"""The race: what counts as done, and how runs are started."""

import json
import sys

import pytest

from freqfusion.comparison import race
from freqfusion.comparison.race import Job, Slot, make_slots, run_jobs
from run_folders import write_run


def test_slots_share_cores_and_devices():
    assert make_slots(3, 99, cores=16, devices=2) == [Slot(5, 0), Slot(5, 1), Slot(5, 0)]
    assert make_slots(None, 99, cores=16, devices=4) == [Slot(4, index) for index in range(4)]
    assert make_slots(8, 99, cores=2, devices=0) == [Slot(1, None)] * 8
    assert make_slots(None, 2, cores=16, devices=0) == [Slot(8, None)] * 2


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
    assert jobs[1].scores() == {"mIoU": 75.0, "boundary IoU": 25.0}
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


def test_at_the_end_of_its_time_what_is_done_is_kept(tmp_path, monkeypatch):
    """Room for two: of five runs one was done before, one comes to its end, two are cut off, one never begins."""
    jobs = [race.job_of(tmp_path, name, 0) for name in ("before", "quick", "slow", "slow_too", "late")]
    write_run(jobs[0].folder)
    write_run(tmp_path / "ready")
    script = (
        "import shutil, sys, time; folder = sys.argv[sys.argv.index('--out') + 1]\n"
        "if 'slow' in folder: time.sleep(60)\n"
        f"shutil.copytree({str(tmp_path / 'ready')!r}, folder, dirs_exist_ok=True)\n"
    )
    original = race.subprocess.Popen
    monkeypatch.setattr(
        race.subprocess,
        "Popen",
        lambda command, **options: original([sys.executable, "-c", script, *command[4:]], **options),
    )
    clock = 0.0

    def watch():
        nonlocal clock
        if jobs[1].exit_code() is not None:
            clock = 9.0

    monkeypatch.setattr(race.time, "monotonic", lambda: clock)
    run_jobs(jobs, [Slot(1, None)] * 2, [], watch, end=8.0)
    assert [job.state for job in jobs] == ["done", "done", "waiting", "waiting", "waiting"]
    assert jobs[2].process.returncode is not None
    assert jobs[3].process.returncode is not None
    assert jobs[4].process is None


def test_an_unfinished_run_is_not_done_by_being_judged(tmp_path):
    job = race.job_of(tmp_path, "carafe", 0)
    write_run(job.folder, judged=None)
    assert job.is_done()
    (job.folder / "run.json").write_text(json.dumps({"steps": 60, "parameters": 7}))
    assert not job.is_done()
