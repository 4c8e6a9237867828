"""Rounds, ratios and notes, on a clock that the tests turn."""

from types import SimpleNamespace

import pytest
import torch

from freqfusion.benchmarks import runner
from freqfusion.benchmarks.cases import BOTH, FORWARD, PASSES, Case, Shape, Work
from freqfusion.benchmarks.memory import Probe
from freqfusion.benchmarks.runner import (
    Result,
    Settings,
    measure_case,
    median_ratio,
    take_turns,
    thread_count,
)

CASE = Case("normalize k5", Shape(1, 8, (3, 4), (6, 8)))
SETTINGS = Settings(torch.device("cpu"), torch.float32, threads=1, rounds=3)


@pytest.fixture
def calls(monkeypatch):
    """Makes calls that take as many seconds as they are told, one after the other, the last for ever."""
    now = 0.0
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: now))

    def make(*seconds):
        left = list(seconds)

        def call():
            nonlocal now
            now += left.pop(0) if len(left) > 1 else left[0]

        return call

    return make


def test_rounds_are_interleaved_and_the_first_changes(calls):
    seen = []
    samples, failures = take_turns({"a": calls(1.0), "b": calls(2.0)}, 3, {}, step=seen.append)
    assert samples == {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]}
    assert not failures
    assert [what[0] for what in seen] == list("ababbaab")
    assert seen[0] == "a, warm-up"
    assert seen[-1] == "b, round 3 of 3"


def test_the_slow_get_fewer_rounds_and_no_warm_up(calls):
    # 4 s fit twice into the budget of 10 s
    samples, _ = take_turns(
        {"fast": calls(1.0), "slow": calls(4.0, 4.5, 4.25), "slowest": calls(30.0, 31.0)},
        5,
        {"fast": 1.0, "slow": 4.0, "slowest": 30.0},
    )
    assert samples == {"fast": [1.0] * 5, "slow": [4.0, 4.5], "slowest": [30.0]}


def test_short_passes_repeat_within_a_turn_and_wait_once(calls):
    waits = []
    samples, _ = take_turns({"a": calls(0.0, 0.004)}, 2, {}, wait=lambda: waits.append(1))
    assert samples["a"] == pytest.approx([0.004, 0.004])
    assert len(waits) == 2 + 2  # warm-up, its timing, two turns


def test_a_failure_costs_only_its_own_figures(calls):
    def fail():
        raise RuntimeError("no room\nand more")

    samples, failures = take_turns({"a": fail, "b": calls(1.0)}, 1, {})
    assert samples == {"b": [1.0]}
    assert failures == {"a": "no room"}


def test_ratios_are_medians_of_rounds():
    assert median_ratio([10.0, 20.0, 90.0], [5.0, 4.0, 9.0]) == 5.0  # of 2, 5 and 10
    assert median_ratio([10.0], [5.0, 4.0, 9.0]) == 2.0
    assert median_ratio([], [1.0]) is None
    assert median_ratio([1.0], []) is None


def test_median_and_spread():
    result = Result(CASE, "torch", FORWARD, Work(1, 1), samples=(1.0, 2.0, 3.0, 4.0, 9.0))
    assert (result.median, result.spread) == (3.0, 1.0)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_case_is_measured(monkeypatch):
    def probe(case, contestant, *rest):
        if contestant == "unfold":
            raise RuntimeError("too little memory")
        return Probe(dict.fromkeys(PASSES, 0.1), {FORWARD: 10, BOTH: 20})

    monkeypatch.setattr(runner, "probe", probe)
    monkeypatch.setattr(runner, "MIN_SECONDS", 1e-5)
    results = measure_case(CASE, ["unfold", "torch", "native"], SETTINGS)
    assert [(r.pass_name, r.contestant) for r in results] == [
        (pass_name, name) for pass_name in PASSES for name in ("unfold", "torch", "native")
    ]
    for peer, by_torch, native in (results[:3], results[3:]):
        assert (peer.samples, peer.note) == ((), "too little memory")
        assert len(by_torch.samples) == 3
        assert by_torch.ratio is None  # there is no peer to compare with
        assert by_torch.note == ""
        assert native.samples == ()
        assert native.note
    assert [r.peak_bytes for r in results if r.contestant == "torch"] == [10, 20]
    assert results[1].work.bytes < results[4].work.bytes


def test_ratios_of_a_case_are_to_the_peer(monkeypatch):
    monkeypatch.setattr(
        runner, "probe", lambda *rest: Probe(dict.fromkeys(PASSES, 0.1), dict.fromkeys(PASSES))
    )
    turns = {"unfold": [8.0, 6.0, 4.0], "torch": [2.0, 2.0, 2.0]}
    monkeypatch.setattr(runner, "take_turns", lambda *rest: (turns, {}))
    peer, by_torch = measure_case(CASE, ["unfold", "torch"], SETTINGS)[:2]
    assert (peer.ratio, by_torch.ratio, by_torch.peak_bytes) == (1.0, 3.0, None)
