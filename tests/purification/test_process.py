"""What a purification shares with the process around it is as it was: random states, threads, worker processes."""

import multiprocessing
import random
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastfip
from fastfip.nets.process import seeded

CPU = torch.device("cpu")


class Points(Dataset):
    """Samples that are read one by one, so that a loader over them stays live."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.full((4,), i / 40) + torch.eye(4)[i % 4], i % 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_live_loader_leaves_every_global_generator_as_it_was():
    loader = DataLoader(Points(), batch_size=8, shuffle=True)
    model, before = net(), None
    for measure in ((), ("acc",), ("acc", "fisher_trace")):
        before = states()
        fastfip.purify(model, loader, "fine_tune", steps=3, test_loader=loader, measure=measure, progress=False)
        assert states() == before


def test_two_threads_draw_what_their_seeds_say_and_leave_the_generators_as_they_were():
    before, drawn = states(), {}

    def draw(seed):
        with seeded(seed, CPU):
            time.sleep(0.02)
            drawn[seed] = (random.random(), float(np.random.rand()), float(torch.rand(())))

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states() == before
    for seed, numbers in list(drawn.items()):
        draw(seed)
        assert drawn[seed] == numbers
    assert states() == before


def test_blocks_of_one_thread_may_be_nested():
    with seeded(1, CPU), seeded(2, CPU):
        inner = torch.rand(())
    with seeded(2, CPU):
        assert torch.equal(torch.rand(()), inner)


def count_start(worker):
    with STARTED.get_lock():
        STARTED.value += 1


STARTED = multiprocessing.Value("i", 0)


def test_workers_are_started_once_a_run_and_end_with_it():
    STARTED.value = 0
    loader = DataLoader(Points(), batch_size=8, num_workers=2, worker_init_fn=count_start)
    result = fastfip.purify(net(), loader, "fine_tune", epochs=6, progress=False)
    # Two that last, and two at most for each pass within a pass; one pass for the labels, six to tune.
    assert 2 <= STARTED.value <= 4
    assert not multiprocessing.active_children()
    alone = fastfip.purify(net(), DataLoader(Points(), batch_size=8), "fine_tune", epochs=6, progress=False)
    for one, other in zip(result.model.parameters(), alone.model.parameters()):
        assert torch.equal(one, other)


def test_workers_end_after_an_error_while_the_error_is_still_held():
    def fails(run, record):
        raise KeyError("mine")

    loader = DataLoader(Points(), batch_size=8, num_workers=1)
    with pytest.raises(KeyError) as held:
        fastfip.purify(net(), loader, "fine_tune", epochs=2, callbacks=fails, progress=False)
    assert held.value is not None and not multiprocessing.active_children()


@pytest.mark.parametrize("where", ["on_start", "on_step", "on_epoch", "on_end"])
def test_the_progress_bar_has_no_thread_after_a_callback_raises(where, capsys):
    def fails(self, *args):
        raise KeyError("mine")

    callback = type("Fails", (fastfip.Callback,), {where: fails})()
    before = set(threading.enumerate())
    with pytest.raises(KeyError):
        fastfip.purify(net(), (torch.rand(8, 4), torch.arange(8) % 4), "fine_tune", callbacks=[callback], progress=True)
    for _ in range(50):
        if set(threading.enumerate()) <= before:
            break
        time.sleep(0.02)
    assert set(threading.enumerate()) <= before
