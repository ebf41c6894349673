"""What the benchmarks read out of a GPU's profile."""

from types import SimpleNamespace

import pytest

from train.benchmarks import input_on_gpu
from train.benchmarks.measuring import union


def test_intervals_that_meet_or_overlap_are_one():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


def test_a_gpu_is_idle_where_none_of_its_streams_runs(monkeypatch, tmp_path):
    spans = [(0, 4e6), (1e6, 5e6), (5.5e6, 8e6), (10e6, 20e6)]
    events = [SimpleNamespace(name="dot", start_ns=a, duration_ns=b - a) for a, b in spans]
    events.append(SimpleNamespace(name="MemcpyH2D", start_ns=8e6, duration_ns=2e6))
    monkeypatch.setattr(input_on_gpu, "gpu_events", lambda folder: [events, []])
    found = input_on_gpu.idle(tmp_path)
    assert found["profiled_s"] == pytest.approx(0.02)
    assert found["idle_share"] == pytest.approx(2.5 / 20)
    assert found["longest_idle_ms"] == pytest.approx(2)
    assert found["idle_share_over_1_ms"] == pytest.approx(2 / 20)
