"""Several processes whose rows of a batch go through the model in parts: the same weights, and less memory in each."""

import os

import pytest
import torch
import torch.distributed as dist

import fastfip
from fastfip.errors import FastFIPError
from tests.purification.test_ranks import furthest, samples, trained
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"),
    pytest.mark.usefixtures("short_search"),
]

#: Adam's first steps are the signs of gradients, those of rounding included; `fisher_steps` multiplies rounding.
RUNS = {
    "fine_tune": ({}, torch.float32, 1e-5),
    "wfip": ({"unlearn": 0.5}, torch.float32, 1e-5),
    "fast_wfip": ({"optimizer": "sgd", "lr": 0.01}, torch.float32, 1e-5),
    "fisher_steps": ({}, torch.float64, 1e-6),
}
FEW = 3


def run(name, group, **options):
    """Return the weights, the notes and the most samples that went through the model together with a graph."""
    settings, dtype, _ = RUNS[name]
    (x, y), model, sizes = samples(), trained(dtype), []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    done = fastfip.purify(
        model, (x.to(dtype), y), name, steps=4, batch_size=16, bn_mode="eval", group=group, progress=False,
        inplace=True, test_loader=[(x.to(dtype), y)], **settings, **options,
    )  # fmt: skip
    return dict(done.state_dict()), done.notes, max(sizes), done.settings["micro_batch"]


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    def work(rank):
        found = {name: run(name, "auto", micro_batch=FEW) for name in RUNS}
        found["memory"] = run("fine_tune", "auto", memory="20GB")
        return found

    return in_processes(2, tmp_path_factory.mktemp("two"), work)


@pytest.mark.parametrize("name", RUNS)
def test_parts_in_two_processes_make_the_steps_of_whole_batches_in_one(name, in_two):
    assert isinstance(in_two[0], dict), in_two
    alone, _, together, _ = run(name, None)
    start = trained(RUNS[name][1]).state_dict()
    assert furthest(alone, start) > 1e-3 and together > FEW
    assert furthest(alone, in_two[0][name][0]) <= RUNS[name][2]
    assert furthest(in_two[0][name][0], in_two[1][name][0]) == 0.0


@pytest.mark.parametrize("name", RUNS)
def test_no_process_has_more_samples_in_a_pass_than_asked_for(name, in_two):
    assert [answer[name][2] for answer in in_two] == [FEW, FEW]


def test_a_budget_is_of_each_process_and_all_of_them_take_the_same_parts(in_two):
    chosen = {answer["memory"][3] for answer in in_two}
    assert len(chosen) == 1 and None not in chosen
    assert max(chosen) <= 32  # of a batch of 64 each has half
    assert any("in each process: micro_batch=" in note for note in in_two[0]["memory"][1])


def test_a_budget_that_one_process_cannot_keep_ends_all_of_them(tmp_path):
    def work(rank):
        try:
            run("fine_tune", "auto", memory="20GB" if rank == 0 else "1MB")
        except FastFIPError as error:
            return str(error)
        return None

    first, second = in_processes(2, tmp_path, work)
    assert "not enough" in second and "needs about" in second
    assert "rank 1 failed" in first and "not enough" in first


def test_processes_that_were_given_other_parts_are_told_so(tmp_path):
    def work(rank):
        try:
            run("fine_tune", "auto", micro_batch=FEW + rank)
        except FastFIPError as error:
            return str(error)
        return None

    assert all("micro_batch=" in said for said in in_processes(2, tmp_path, work))


def test_gradient_checkpointing_is_refused_before_anything_is_gathered(tmp_path):
    def work(rank):
        try:
            run("fine_tune", "auto", gradient_checkpointing=True)
        except FastFIPError as error:
            return str(error)
        return None

    assert all("for one process: leave it out" in said for said in in_processes(2, tmp_path, work))
