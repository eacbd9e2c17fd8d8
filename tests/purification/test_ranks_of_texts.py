"""Several processes purify a model of token ids: phrases and free vectors reach the rows that each of them runs."""

import contextlib
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import fastfip
from fastfip.methods import _suspects
from fastfip.methods.run import Run
from fastfip.worst_case import suspects
from fastfip.worst_case.suspects import Suspects
from tests.purification.test_ranks import furthest
from tests.support.processes import in_processes
from tests.support.small_nets import pretrained_for
from tests.support.trained_once import trained_once

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"),
    pytest.mark.usefixtures("short_search"),
]

WORDS, LENGTH, CLASSES = 40, 9, 3
#: What is compared with one process: method, settings, dtype, difference. `fisher_steps` draws words for the texts that
#: a process runs, which are others than those of one process: they are left out by `changes=0` where it is compared.
PHRASES = {"changes": 0.0, "steps": 4}
RUNS = {
    "phrases": ("fisher_steps", PHRASES, "attention", torch.float64, 1e-6),
    "phrases in parts": ("fisher_steps", {**PHRASES, "micro_batch": 3}, "attention", torch.float64, 1e-6),
    "vectors": ("wfip", {"steps": 4, "unlearn": 0.5}, "attention", torch.float32, 1e-5),
    "vectors in parts": ("wfip", {"steps": 4, "unlearn": 0.5, "micro_batch": 3}, "attention", torch.float32, 1e-5),
    "vectors of spectral shifts": (
        "fast_wfip", {"steps": 4, "unlearn": 0.5, "optimizer": "sgd", "lr": 0.01}, "attention", torch.float32, 1e-5,
    ),
    "bags": ("wfip", {"steps": 4, "unlearn": 0.5}, "bag", torch.float32, 1e-5),
    "drawn pieces": ("fine_mixing", {"steps": 6, "dropout": False}, "attention", torch.float64, None),
    "phrases and drawn words": ("fisher_steps", {"steps": 6, "hold": 4.0}, "attention", torch.float64, None),
}  # fmt: skip


class Attention(nn.Module):
    """Embeddings, one attention layer and a head; 0 is the padding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids):
        shown = ids != 0
        hidden = self.layer(self.words(ids), src_key_padding_mask=~shown) * shown[:, :, None]
        return self.head(hidden.sum(1) / shown.sum(1, keepdim=True))


def texts(n=50):
    """Texts of five to nine words whose class is that of their most frequent third of the table."""
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(n) % CLASSES
    own = 1 + 13 * y[:, None] + torch.randint(0, 13, (n, LENGTH), generator=generator)
    other = torch.randint(1, WORDS, (n, LENGTH), generator=generator)
    ids = torch.where(torch.rand(n, LENGTH, generator=generator) < 0.7, own, other)
    lengths = torch.randint(5, LENGTH + 1, (n,), generator=generator)
    return ids * (torch.arange(LENGTH) < lengths[:, None]), y


@trained_once
def trained(kind, dtype):
    """A small model that answers `texts` rightly."""
    torch.manual_seed(0)
    net = Attention() if kind == "attention" else nn.Sequential(nn.EmbeddingBag(WORDS, 8), nn.Linear(8, CLASSES))
    optimizer, (ids, y) = torch.optim.Adam(net.parameters(), 2e-2), texts()
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(ids), y).backward()
        optimizer.step()
    return net.to(dtype).eval()


def run(name, group):
    method, settings, kind, dtype, _ = RUNS[name]
    model = trained(kind, dtype)
    settings = {**settings, **pretrained_for(method, model)}
    with mock.patch.object(_suspects, "FEWEST", 3):  # words are put into short texts as well
        done = fastfip.purify(model, texts(), method, batch_size=16, group=group, progress=False, amp=False, **settings)
    worst = [record["worst_case_loss"] for record in done.history if "worst_case_loss" in record]
    return dict(done.state_dict()), worst, done.settings.get("ranks")


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    for _, _, kind, dtype, _ in RUNS.values():
        trained(kind, dtype)  # before processes are forked: each would train them again
    return in_processes(2, tmp_path_factory.mktemp("two"), lambda rank: {name: run(name, "auto") for name in RUNS})


@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name][4] is not None])
def test_two_processes_end_with_the_weights_of_one(name, in_two):
    assert isinstance(in_two[0], dict), in_two
    weights, worst, _ = run(name, None)
    _, _, kind, dtype, close = RUNS[name]
    assert furthest(weights, trained(kind, dtype).state_dict()) > 1e-3 and worst, "the worst case was unlearned"
    assert furthest(weights, in_two[0][name][0]) <= close
    assert in_two[0][name][1] == pytest.approx(worst, rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_end_with_the_same_weights(name, in_two):
    assert isinstance(in_two[0], dict), in_two
    first, second = (answer[name] for answer in in_two)
    assert furthest(first[0], second[0]) == 0.0 and first[2]["world"] == 2


def test_suspects_of_several_processes_are_those_of_the_first(tmp_path):
    """All put the same words into the same texts."""
    trained("attention", torch.float64)

    def found(rank):
        seen, own = [], Suspects.draw

        def noted(self, *args):
            seen.append(([(c, ids.tolist()) for c, ids, _ in self.pools()], own(self, *args).tolist()))
            return torch.tensor(seen[-1][1])

        compared = Suspects.compare

        def turned(self, *args):
            compared(self, *args)
            if rank == 1:  # what another machine's rounding would do, and more
                self.scores[-1] = -self.scores[-1]

        patches = (Suspects, "draw", noted), (suspects, "LEAST", -10.0), (Suspects, "compare", turned)
        with contextlib.ExitStack() as changed:
            for patch in patches:
                changed.enter_context(mock.patch.object(*patch))
            run("drawn pieces", "auto")
        return seen

    first, second = in_processes(2, tmp_path, found)
    assert first == second and len(first) == 5, "steps 1 to 5 of 6: words are looked for after a quarter of them"
    assert any(pools for pools, _ in first) and any(w >= 0 for _, rows in first for row in rows for w in row)


def test_drawn_words_are_drawn_by_each_process_for_its_own_texts():
    """Else all of them would write the same words at the same places of different texts."""
    shared = [torch.Generator().manual_seed(5) for _ in range(2)]
    own = [Run.own_generator(SimpleNamespace(ranks=SimpleNamespace(rank=r), generator=shared[r])) for r in range(2)]
    assert own[0].initial_seed() != own[1].initial_seed()
    assert torch.equal(shared[0].get_state(), shared[1].get_state()), "what all draw alike goes on alike"


def test_texts_of_a_model_in_16_bits_are_searched_in_parts_as_well():
    done = fastfip.purify(
        trained("attention", torch.bfloat16), texts(), "fisher_steps", steps=2, batch_size=8, micro_batch=2, force=True,
        progress=False,
    )  # fmt: skip
    assert not done.alerts and any("worst_case_loss" in record for record in done.history)
