"""Score networks with and without a backdoor by the largest margin of their classes (`fastfip.auditing.margins`).

    python -m benchmarks.purification.audit_margins             # what is missing in results/audit_margins.csv
    python -m benchmarks.purification.audit_margins --table     # what it holds, and the table of docs/audit.md

Three sources: published networks, those networks of the suite that are in the cache (none is trained for this), and
small ones that are trained here in minutes and kept in the cache. The score and its threshold were set on the networks
that are called development here; those called held-out were scored once, afterwards. A clean network is one that no
backdoor was put into, or (`nad_cifar10_wrn16_1_erased`) one whose authors have removed it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification import real_data
from benchmarks.suite import networks as suite
from fastfip.attacks import Injection, get, poison_and_train
from fastfip.attacks.base import in_range
from fastfip.auditing.margins import SUSPICIOUS, margins

IMAGES = 500
#: Networks of the suite without a backdoor that were seen in development; another one is held out.
SEEN = ("resnet20-clean", "gtsrb-clean")
RESULTS = harness.Results(
    "audit_margins",
    "net set base attack target asr acc first score index ratio p suspicious seconds cpu_seconds machine threads "
    "torch fastfip commit native",
    run="net",
    order=lambda r: (r["set"] != "development", r["attack"] == "none", r["net"]),
)


@dataclass(frozen=True)
class Own:
    """A network that is trained here.

    A digits network is trained from scratch on `images` of the suite's training images, another one from the suite's
    clean one.
    """

    base: str
    attack: str
    target: Any
    seed: int
    images: int
    epochs: int
    rate: float = 0.1
    set: str = "held-out"

    @property
    def name(self) -> str:
        """Return what rows call it."""
        return f"own-{self.base}-{self.attack}-{self.seed if self.attack == 'none' else self.target}"


OWN = {
    own.name: own
    for own in (
        *(Own("digits", "none", None, seed, 5000, 10, set="development") for seed in (1, 2, 3, 4)),
        Own("gtsrb", "none", None, 1, 4300, 8, set="development"),
        Own("digits", "badnets", 0, 5, 5000, 10, set="development"),
        Own("digits", "badnets", "next", 5, 5000, 10, set="development"),
        Own("resnet20", "blend", 0, 5, 5000, 2, set="development"),
        *(Own("digits", "none", None, seed, 5000, 10) for seed in (5, 6, 7, 8)),
        Own("digits", "trojannet", 4, 6, 5000, 10),
        Own("digits", "lira", 2, 6, 5000, 10),
        Own("digits", "advdoor", 8, 6, 5000, 10),
        Own("digits", "dynamic", 1, 6, 5000, 10),
        Own("resnet20", "none", None, 6, 5000, 2),
        Own("resnet20", "trojannet", 5, 6, 5000, 2),
        Own("resnet20", "none", None, 7, 5000, 2),
        Own("resnet20", "advdoor", 7, 6, 5000, 2),
        Own("gtsrb", "none", None, 2, 4300, 4),
    )
}


@dataclass
class Subject:
    """A network that is scored: clean images as it takes them, what is known of it for the row."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    known: Row


def made(own: Own) -> dict[str, Any]:
    """Train a network; return its weights, accuracy and attack success."""
    base, data = suite.BASES[own.base], suite._data(own.base)
    order = np.sort(np.random.default_rng(100 + own.seed).permutation(len(data["train_y"]))[: own.images])
    x, y = suite._first(data["train_x"][order]), torch.from_numpy(data["train_y"][order])
    torch.manual_seed(own.seed)
    model = base.make() if own.base == "digits" else suite.clean_model(own.base)
    planted = [] if own.attack == "none" else [Injection(get(own.attack)(), own.target, own.rate, None)]
    classes = int(data["train_y"].max()) + 1
    out = poison_and_train(
        model, (x, y), planted, classes=classes, pixels=base.pixels, epochs=own.epochs, lr=base.lr, crop=base.crop,
        flip=base.flip, seed=own.seed,
    )  # fmt: skip
    tested, true = in_range(suite._first(data["test_x"][:1000])), torch.from_numpy(data["test_y"][:1000])
    held = {"model": out.model.state_dict(), "acc": _share(out.model, base.pixels.normalise(tested), true), "asr": ""}
    if planted:
        shown, wanted, *_ = out.injections[0].ready()[0].asr_set(tested, true, own.target, classes, None)
        held["asr"] = _share(out.model, base.pixels.normalise(shown.float()), wanted)
    return held


@torch.no_grad()
def _share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    said = torch.cat([model(part).argmax(1) for part in x.split(250)])
    return round(100 * float(said.eq(y).float().mean()), 2)


def own_subject(own: Own) -> Subject:
    """Return a network that is trained here, from the cache if it is there."""
    folder = harness.cache_dir() / "audit"
    folder.mkdir(exist_ok=True)
    held = suite._kept(folder / f"{own.name}-{own.seed}-{own.images}-{own.epochs}.pth", lambda: made(own))
    model = suite.BASES[own.base].make()
    model.load_state_dict(held["model"])
    known = {"set": own.set, "base": own.base, "attack": own.attack, "asr": held["asr"], "acc": held["acc"]}
    return Subject(model.eval(), *_clean(own.base), {**known, "target": "" if own.target is None else own.target})


def _clean(base: str) -> tuple[Tensor, Tensor]:
    data = suite._data(base)
    picked = real_data.sample_clean(data["pool_y"], IMAGES, 0)
    x = suite.BASES[base].pixels.normalise(in_range(suite._first(data["pool_x"][picked])))
    return x, torch.from_numpy(data["pool_y"][picked])


def suite_subject(name: str) -> Subject:
    """Return a network of the suite."""
    network = suite.NETWORKS[name]
    prepared = suite.prepare(network)
    development = network.set == "development" if network.backdoors else name in SEEN
    known = {
        "set": "development" if development else "held-out", "base": network.base,
        "attack": " ".join(b.attack for b in network.backdoors) or "none",
        "target": " ".join(str(b.target) for b in network.backdoors),
        "asr": " ".join(f"{100 * (found.asr or 0):.1f}" for found in prepared.attacked),
        "acc": round(100 * (prepared.clean.acc or 0), 2),
    }  # fmt: skip
    return Subject(prepared.model, *_clean(network.base), known)


def real_subject(name: str) -> Subject:
    """Return a published network."""
    real = real_data.load_real(name)
    clean = real.target is None or name.endswith("erased")
    acc, asr = real.recorded
    known = {
        "set": "development", "base": "published", "attack": "none" if clean else "badnets",
        "target": "" if clean else real.target, "asr": "" if clean else asr, "acc": acc,
    }  # fmt: skip
    return Subject(real.model, *real.clean_set(IMAGES), {**known, "attack": _published(name, clean)})


def _published(name: str, clean: bool) -> str:
    return "none" if clean else next((word for word in ("l2inv", "pattern") if word in name), "badnets")


def available() -> dict[str, Any]:
    """Return by name what makes each network that can be scored here."""
    kept = [n for n, net in suite.NETWORKS.items() if (suite.folder() / f"{net.key()}.pth").exists()]
    return {
        **{name: lambda name=name: real_subject(name) for name in real_data.names()},
        **{name: lambda name=name: suite_subject(name) for name in kept},
        **{name: lambda own=own: own_subject(own) for name, own in OWN.items()},
    }


def row(name: str, subject: Subject) -> Row:
    """Score a network."""
    start, cpu = time.perf_counter(), time.process_time()
    found = margins(subject.model, [(subject.images, subject.labels)])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    ranks = found.ranking
    return {
        "net": name, **subject.known, "first": ranks.classes[0], "score": round(found.score, 3),
        "index": round(ranks.index[0], 2), "ratio": round(1 / ranks.ratio, 2),
        "p": "" if ranks.p is None else f"{ranks.p:.2g}", "suspicious": "yes" if found.suspicious else "no",
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
    }  # fmt: skip


def auc(bad: Sequence[float], good: Sequence[float]) -> float:
    """Return the chance that a backdoored network scores higher than a clean one; ties count half."""
    wins = [(b > g) + 0.5 * (b == g) for b in bad for g in good]
    return sum(wins) / len(wins)


def bootstrapped(bad: Sequence[float], good: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """Return the 95 % interval of the AUC, both groups drawn anew with repetition."""
    rng = np.random.default_rng(0)
    found = [auc(rng.choice(bad, len(bad)).tolist(), rng.choice(good, len(good)).tolist()) for _ in range(draws)]
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def summary(rows: Sequence[dict[str, str]]) -> str:
    """Return the table of the document: AUC, and what the threshold finds."""
    out = []
    for label, chosen in (
        ("development", [r for r in rows if r["set"] == "development"]),
        ("held-out", [r for r in rows if r["set"] != "development"]),
        ("held-out, one target", [r for r in rows if r["set"] != "development" and r["target"] != "next"]),
        ("all", list(rows)),
    ):
        bad = [r for r in chosen if r["attack"] != "none"]
        good = [r for r in chosen if r["attack"] == "none"]
        if not bad or not good:
            continue
        high_ones, low_ones = ([float(r["score"]) for r in part] for part in (bad, good))
        low, high = bootstrapped(high_ones, low_ones)
        level = float(np.quantile(low_ones, 0.95, method="higher"))
        out.append([
            label, f"{len(bad)} + {len(good)}", f"{auc(high_ones, low_ones):.2f} ({low:.2f} to {high:.2f})",
            _counted(sum(s > level for s in high_ones), len(bad)),
            _counted(sum(r["suspicious"] == "yes" for r in bad), len(bad)),
            _counted(sum(r["suspicious"] == "yes" for r in good), len(good)),
            _counted(sum(r["first"] in r["target"].split() for r in bad if r["target"] != "next"),
                     sum(r["target"] != "next" for r in bad)),
        ])  # fmt: skip
    head = [
        "networks", "backdoored + clean", "AUC", "found at 5 % false alarms", f"found from {SUSPICIOUS} on",
        f"false alarms from {SUSPICIOUS} on", "target first",
    ]  # fmt: skip
    return harness.table(head, out)


def _counted(hits: int, n: int) -> str:
    low, high = wilson(hits, n) if n else (0.0, 1.0)
    return f"{hits} of {n} ({100 * low:.0f} to {100 * high:.0f} %)"


def each(rows: Sequence[dict[str, str]]) -> str:
    """Return a table with a line for each network."""
    head = "net set attack target asr first score index ratio suspicious cpu_seconds".split()
    return harness.table(head, [[r[name] for name in head] for r in rows])


def main() -> None:
    """Score what is missing, and write the CSV after every network."""
    parser = harness.Parser(__doc__, "again")
    parser.add_argument("--nets", nargs="*", default=None)
    parser.add_argument("--table", action="store_true", help="only print what the CSV holds, and write the document")
    args = parser.parse()
    if not args.table:
        real_data.require()
        found = available()
        for name in args.nets or found:
            if args.again or name not in {r["net"] for r in RESULTS.read()}:
                scored = row(name, found[name]())
                RESULTS.add([scored])
                harness.show({k: scored[k] for k in ("net", "target", "first", "score", "suspicious")}, 12, net=-36)
    rows = RESULTS.read()
    print(each(rows), summary(rows), sep="\n\n")
    if args.table:
        harness.splice(harness.DOCS / "audit.md", "margins", f"{summary(rows)}\n\n{each(rows)}")


if __name__ == "__main__":
    main()
