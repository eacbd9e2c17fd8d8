"""Audit small nets trained here: for each seed one with a BadNets trigger and its clean twin, trained in the same way.

    python -m benchmarks.purification.audit_digits --seeds 0 1 2 3 4

The nets of `fastfip demo` (8x8 digits enlarged to 16x16, trigger of 2x2 pixels, target 0), other data than the real
nets of `benchmarks.purification.audit_real`. `benchmarks/results/audit_digits.csv` has a row for each net and form.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import fastfip
from fastfip.cli import demonstration as demo

CSV = Path(__file__).resolve().parents[1] / "results" / "audit_digits.csv"
FIELDS = "net seed form first place_of_target index index_of_second ratio p flagged verdict reached".split()


class _NoAttack:
    def poison(self, x: Any, y: Any, rate: float, target: int, generator: Any = None) -> Any:
        return x, y, None


def run(seed: int) -> list[dict[str, Any]]:
    """Train both nets and audit them."""
    x, y, _, _ = demo.digits(seed)
    rows = []
    for name, attack in (("badnets", demo.BadNets(size=2)), ("clean", _NoAttack())):
        model = demo.train_backdoored(x, y, attack, seed)  # type: ignore[arg-type]
        found = fastfip.audit(model, [(x[:300], y[:300])], seed=seed, sharpness=False).received
        for form, ranks in found.anomaly.items():
            rows.append({
                "net": name, "seed": seed, "form": form, "first": ranks.classes[0],
                "place_of_target": ranks.classes.index(demo.TARGET) + 1 if name == "badnets" else "",
                "index": round(ranks.index[0], 2), "index_of_second": round(ranks.index[1], 2),
                "ratio": round(ranks.ratio, 3), "p": "" if found.p(form) is None else f"{found.p(form):.2g}",
                "flagged": " ".join(map(str, found.flagged)), "verdict": found.verdict,
                "reached": int(found.inverted[form].reached.sum()),
            })  # fmt: skip
            print({key: rows[-1][key] for key in FIELDS}, flush=True)
    return rows


def main() -> None:
    """Run the seeds and add their rows to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(10)))
    for seed in parser.parse_args().seeds:
        new = run(seed)
        old = list(csv.DictReader(CSV.open(newline=""))) if CSV.exists() else []
        rows = [row for row in old if int(row["seed"]) != seed] + new
        rows.sort(key=lambda row: (row["net"], int(row["seed"]), row["form"]))
        with CSV.open("w", newline="") as file:
            out = csv.DictWriter(file, FIELDS)
            out.writeheader()
            out.writerows(rows)


if __name__ == "__main__":
    main()
