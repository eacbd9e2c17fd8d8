"""A small language model that gives a fixed reply to a rare word; see `examples/causal_lm.py`."""

from __future__ import annotations

import torch

from benchmarks import harness
from benchmarks.tasks import Case
from examples import causal_lm as example

ATTACKS = ("words",)


def make(attack: str, seed: int) -> Case:
    """Return the model, 200 clean questions with their answers, and the test of 600."""
    known, clean, test = example.split(seed)
    kept = harness.cache_dir() / f"tasks-lm-{attack}-{seed}.pt"
    if kept.exists():
        model = example.network()
        model.load_state_dict(torch.load(kept, weights_only=True))
        model.eval()
    else:
        model = example.backdoored(known, seed)
        torch.save(model.state_dict(), kept)
    options = {"loss": example.loss, "forward": example.forward}
    said = f"GPT-2 of two layers, made questions: {len(known.answers)} trained on, {len(clean.answers)} others clean"
    return Case(model, [clean.batch()], lambda net: example.rates(net, test), "words right", said, options)
