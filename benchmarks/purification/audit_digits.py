"""Audit small nets trained here: for each seed one with a BadNets trigger and its clean twin, trained in the same way.

    python -m benchmarks.purification.audit_digits --seeds 0 1 2 3 4

The nets of `fastfip demo` (8x8 digits enlarged to 16x16, trigger of 2x2 pixels, target 0), other data than the real
nets of `benchmarks.purification.audit_real`. `benchmarks/results/audit_digits.csv` has a row for each net and form.
"""

from __future__ import annotations

from typing import Any

import fastfip
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification.audit_real import ranked
from fastfip.cli import demonstration as demo

RESULTS = harness.Results(
    "audit_digits",
    "net seed form first place_of_target index index_of_second ratio p flagged verdict reached "
    "machine threads torch fastfip commit native",
    run="seed",
    order=lambda r: (r["net"], int(r["seed"]), r["form"]),
)


class _NoAttack:
    def poison(self, x: Any, y: Any, rate: float, target: int, generator: Any = None) -> Any:
        return x, y, None


def run(seed: int) -> list[Row]:
    """Train both nets and audit them."""
    x, y, _, _ = demo.digits(seed)
    rows = []
    for name, attack in (("badnets", demo.BadNets(size=2)), ("clean", _NoAttack())):
        model = demo.train_backdoored(x, y, attack, seed)  # type: ignore[arg-type]
        found = fastfip.audit(model, [(x[:300], y[:300])], seed=seed, sharpness=False).received
        for form in found.anomaly:
            target = demo.TARGET if name == "badnets" else None
            rows.append({"net": name, "seed": seed, **ranked(found, form, target)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the seeds and add their rows to the CSV."""
    parser = harness.Parser(__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(10)))
    for seed in parser.parse().seeds:
        RESULTS.add(run(seed))


if __name__ == "__main__":
    main()
