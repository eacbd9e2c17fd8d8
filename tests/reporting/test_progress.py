"""Lines that say how far a long piece of work is."""

import torch

import fastfip
from fastfip.fisher import fisher_diagonal
from fastfip.reporting import progress
from fastfip.reporting.progress import Beat, Counted
from tests.support.small_nets import conv_net, loader


def beat(seconds, total=100):
    """The lines of 100 parts that take so many seconds each."""
    said, now = [], [0.0]
    one = Beat(said.append, "work", total, lambda: now[0])
    for done in range(100):
        one.at(done, "loss 1")
        now[0] += seconds
    return said


def test_work_of_minutes_says_every_tenth():
    said = beat(1)
    assert said == [f"work {10 * k} of 100 ({10 * k} %) after {10 * k} s, loss 1" for k in range(1, 10)]


def test_work_of_hours_says_something_every_half_minute():
    assert beat(20)[:3] == [f"work {k} of 100 ({k} %) after {20 * k} s, loss 1" for k in (2, 4, 6)]
    assert beat(20, total=None)[0] == "work 2 after 40 s, loss 1"


def test_work_of_seconds_says_nothing():
    assert beat(0.04) == [] and len(beat(0.2)) <= 4


def test_batches_are_counted_anew_in_each_walk(monkeypatch):
    monkeypatch.setattr(progress, "SHORTEST", -1.0)
    said = []
    batches = Counted([torch.ones(1)] * 20, said.append, "batch")
    for _ in range(2):
        assert len(list(batches)) == 20
    assert [line.split()[1] for line in said] == [str(k) for k in range(2, 20, 2)] * 2


def test_results_do_not_depend_on_lines(monkeypatch):
    monkeypatch.setattr(progress, "SHORTEST", -1.0)
    said = []
    net, options = conv_net(), {"epochs": 3, "seed": 1}
    plain = fastfip.purify(net, loader(), "fine_tune", progress=False, **options)
    lined = fastfip.purify(net, loader(), "fine_tune", progress=said.append, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), lined.state_dict().values()))
    assert said and said[0].startswith("fine_tune, step ") and "loss" in said[-1]
    said.clear()
    fastfip.compare(conv_net(), loader(), [("fine_tune", {"steps": 3})], progress=said.append)
    assert any(line.startswith("fine_tune, step") for line in said)
    said.clear()
    fisher_diagonal(conv_net().eval(), loader(), progress=said.append)
    assert said == [] or said[0].startswith("Fisher diagonal, batch")
