"""Audit the real networks with clean images alone: a row for each net, form and seed in `benchmarks/results/audit.csv`.

    python -m benchmarks.purification.audit_real                       # what is missing
    python -m benchmarks.purification.audit_real --nets badnets_mnist --seeds 0 --purify fast_wfip --picture audit.png

The trigger is not used: the target class is only looked up to see at which place the audit ranks it. With `--purify`
the net is purified first (5 % clean images, default settings) and audited after that as well: `state` says which of
the two a row is of, `received_success` how often the change found on the received net still works for that class.
These nets were at hand while the search was written: they are a development set. `audit_digits.py` has others.
"""

from __future__ import annotations

import time
from typing import Any

import fastfip
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification import real_data

RESULTS = harness.Results(
    "audit",
    "net state seed clean_images form target first place_of_target index index_of_second index_of_target ratio p "
    "flagged verdict reached classes received_success size_of_first seconds threads machine torch fastfip commit "
    "native",
    run="net state seed",
    order=lambda r: (real_data.names().index(r["net"]), r["state"] != "received", int(r["seed"]), r["form"]),
)
IMAGES = 1000


def ranked(net: Any, form: str, target: int | None) -> Row:
    """Return what one form of search says of one audited net."""
    ranks = net.anomaly[form]
    return {
        "form": form, "first": ranks.classes[0],
        "place_of_target": "" if target is None else ranks.classes.index(target) + 1,
        "index": round(ranks.index[0], 2), "index_of_second": round(ranks.index[1], 2),
        "ratio": round(ranks.ratio, 3), "p": "" if net.p(form) is None else f"{net.p(form):.2g}",
        "flagged": " ".join(map(str, net.flagged)), "verdict": net.verdict,
        "reached": int(net.inverted[form].reached.sum()),
    }  # fmt: skip


def run(name: str, seed: int, purify: str | None, picture: str | None) -> list[Row]:
    """Audit one net; return its rows."""
    real = real_data.load_real(name)
    x, y = real.clean_set(IMAGES, seed)
    loader = [(x, y)]
    purified = None
    if purify is not None:
        cx, cy = real.clean_set(round(0.05 * real.train_size), seed, 100 if real.classes > 10 else None)
        clean = real_data.loader(cx, cy)
        purified = fastfip.purify(real.model, clean, purify, seed=seed, amp="bf16", progress=False).model
    start = time.perf_counter()
    # The searches alone: the sharpness of such nets is in the audit of the command line.
    found = fastfip.audit(real.model, loader, purified=purified, seed=seed, amp="bf16", sharpness=False)
    seconds = time.perf_counter() - start
    if picture:
        found.plot(picture)
    print(found, flush=True)
    rows = []
    for net in found.nets:
        for form, ranks in net.anomaly.items():
            target = real.target if isinstance(real.target, int) else None  # all to all: no class is the target
            place = None if target is None else ranks.classes.index(target)
            rows.append({
                "net": name, "state": "received" if net.name == "received" else purify, "seed": seed,
                "clean_images": len(y), "target": "" if target is None else target, **ranked(net, form, target),
                "index_of_target": "" if place is None else round(ranks.index[place], 2),
                "classes": len(ranks.classes),
                "received_success": "" if form not in net.transfer or target is None
                else round(net.transfer[form][target], 3),
                "size_of_first": f"{float(net.inverted[form].size[ranks.classes[0]]):.4g}",
                "seconds": round(seconds / len(found.nets), 1),
            })  # fmt: skip
    return rows


def table() -> str:
    """Return the rows as a Markdown table."""
    head = "net state seed form target first place_of_target index index_of_second ratio p verdict seconds".split()
    return harness.table(head, [[row[name] for name in head] for row in RESULTS.read()])


def main() -> None:
    """Audit what is missing and write the CSV after every net."""
    parser = harness.Parser(__doc__, "again")
    parser.add_argument("--nets", nargs="*", default=None)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--purify", default=None, metavar="METHOD")
    parser.add_argument("--picture", default=None, metavar="FILE")
    parser.add_argument("--table", action="store_true", help="only print what the CSV holds")
    args = parser.parse()
    if not args.table:
        real_data.require()
        for seed in args.seeds:
            for name in args.nets or real_data.names():
                there = {RESULTS.key(row) for row in RESULTS.read()}
                if args.again or (name, args.purify or "received", str(seed)) not in there:
                    RESULTS.add(run(name, seed, args.purify, args.picture))
    print(table())


if __name__ == "__main__":
    main()
