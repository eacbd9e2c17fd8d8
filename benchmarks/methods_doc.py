"""Write what documents say of the methods: from the registry what they are, from the CSV how they did.

    python -m benchmarks.methods_doc            # rewrite docs/methods.md, and the tables in README.md and results.md
    python -m benchmarks.methods_doc --check    # exit code 1 if the methods in it are not those of the registry

What a method does stands in the docstrings of its module and class, its settings in its config; the rest of the file
is written by hand.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from statistics import mean
from typing import Any

from benchmarks import harness
from benchmarks.purification import real_models, real_tables
from benchmarks.purification.real_tables import BADNETS
from benchmarks.suite import tables
from benchmarks.suite.slices import measurable_methods, own_methods
from fastfip import methods
from fastfip.methods import MethodConfig

#: BadNets on CIFAR-10 (ResNet-18 kinds) in the papers: method, where, share of clean images, ACC and ASR before, after.
PAPERS = (
    ("fip", "FIP, Table 6", 0.01, 92.96, 100.0, 89.32, 1.86),
    ("nft", "NFT, Table 1", 0.01, 92.96, 100.0, 90.82, 1.74),
    ("ft_sam", "FT-SAM, BadNets-A2O", 0.05, 91.82, 93.79, 92.21, 1.63),
    ("ft_sam", "NFT, Table 1", 0.01, 92.96, 100.0, 86.17, 4.34),
    ("anp", "FT-SAM, BadNets-A2O", 0.05, 91.82, 93.79, 91.65, 3.83),
    ("anp", "NFT, Table 1", 0.01, 92.96, 100.0, 85.92, 4.87),
    ("i_bau", "FT-SAM, BadNets-A2O", 0.05, 91.82, 93.79, 87.43, 4.48),
    ("i_bau", "NFT, Table 1", 0.01, 92.96, 100.0, 85.96, 2.84),
    ("awm", "NFT, Table 1", 0.01, 92.96, 100.0, 87.85, 5.72),
    ("fine_tune", "FT-SAM, BadNets-A2O", 0.05, 91.82, 93.79, 90.29, 1.70),
)
FILE = harness.DOCS / "methods.md"


def registry() -> str:
    """Return a table of the methods of the package, then a section for each."""
    kinds = [methods.get(name) for name in own_methods()]
    rows = [(f"[`{kind.name}`](#{kind.name})", harness.inline(kind.summary)) for kind in kinds]
    whole = harness.table(["method", "what it does"], rows)
    return "\n".join([whole, "", *(section(kind) for kind in kinds)]).rstrip()


def section(kind: Any) -> str:
    """Return what the docstrings say of a method, and the settings that are its own or differ from the common ones."""
    module = inspect.getdoc(sys.modules[kind.__module__]) or ""
    parts = [f"### {kind.name}", *harness.markdown(module), *harness.markdown(inspect.getdoc(kind) or "")]
    common = {item.name: getattr(MethodConfig(), item.name) for item in dataclasses.fields(MethodConfig)}
    values = kind.Config()
    rows = []
    for item in dataclasses.fields(kind.Config):
        value = getattr(values, item.name)
        if item.name not in common or common[item.name] != value:
            shown = "none" if value is None else f"{value}"
            rows.append((f"`{item.name}`", shown, harness.inline(str(item.metadata.get("help", "")))))
    if rows:
        parts += harness.markdown(inspect.getdoc(kind.Config) or "")
        parts.append(harness.table(["setting", "default", "meaning"], rows))
    return "\n\n".join(parts) + "\n"


def measured() -> str:
    """Return how the methods did on the real networks."""
    return real_tables.by_method(real_models.RESULTS.read())


def papers() -> str:
    """Return what papers report of BadNets on CIFAR-10 beside what the same methods did on the three nets here."""
    rows = [row for row in real_tables.good(real_models.RESULTS.read()) if row["setting"] == "plain"]

    def here(method: str, net: str, share: float) -> str:
        found = [r for r in rows if (r["method"], r["net"], float(r["fraction"])) == (method, net, share)]
        if not found:
            return "-"
        change = mean(float(r["acc"]) - float(r["acc_before"]) for r in found)
        return f"{change:+.1f} / {mean(float(r['asr']) for r in found):.1f}"

    lines = []
    for method, where, share, acc, asr, acc_after, asr_after in PAPERS:
        there = f"{acc_after - acc:+.1f} / {asr_after:.1f} (from {asr:.0f})"
        lines.append([f"`{method}`", where, f"{share:.0%}", there, *(here(method, net, share) for net in BADNETS)])
    return harness.table(["method", "paper", "clean images", "there", *(f"`{net}`" for net in BADNETS)], lines)


def main() -> None:
    """Rewrite or check the file."""
    parser = harness.Parser(__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse().check:
        old = FILE.read_text(encoding="utf-8")
        new = harness.spliced(old, "methods", registry())
        sys.exit(0 if new == old else "docs/methods.md is out of date: python -m benchmarks.methods_doc")
    for mark, make in (("methods", registry), ("measured", measured), ("papers", papers)):
        harness.splice(FILE, mark, make())
    real_models.write_documents()
    harness.splice(harness.README, "suite", tables.readme(tables.validation(), measurable_methods()))


if __name__ == "__main__":
    main()
