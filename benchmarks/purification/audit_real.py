"""Audit the real networks with clean images alone: a row for each net, form and seed in `benchmarks/results/audit.csv`.

    python -m benchmarks.purification.audit_real                       # what is missing
    python -m benchmarks.purification.audit_real --nets badnets_mnist --seeds 0 --purify fast_wfip --picture audit.png

The trigger is not used: the target class is only looked up to see at which place the audit ranks it. With `--purify`
the net is purified first (5 % clean images, default settings) and audited after that as well: `state` says which of
the two a row is of, `received_success` how often the change found on the received net still works for that class.
These nets were at hand while the search was written: they are a development set. `audit_digits.py` has others.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastfip
from benchmarks.purification import real_data
from benchmarks.purification.real_models import commit, machine

CSV = Path(__file__).resolve().parents[1] / "results" / "audit.csv"
FIELDS = (
    "net state seed clean_images form target first place_of_target index index_of_second index_of_target ratio p "
    "flagged verdict reached classes received_success size_of_first seconds threads machine torch fastfip commit"
).split()
IMAGES = 1000


def run(name: str, seed: int, purify: str | None, picture: str | None) -> list[dict[str, Any]]:
    """Audit one net; return its rows."""
    real = real_data.load_real(name)
    real.model.to(memory_format=torch.channels_last)
    x, y = real.clean_set(IMAGES, seed)
    loader = [(x.contiguous(memory_format=torch.channels_last), y)]
    purified = None
    if purify is not None:
        cx, cy = real.clean_set(round(0.05 * real.train_size), seed, 100 if real.classes > 10 else None)
        clean = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(cx, cy), batch_size=128, shuffle=True)
        purified = fastfip.purify(real.model, clean, purify, seed=seed, amp="bf16", progress=False).model
        purified.to(memory_format=torch.channels_last)
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
            inverted, target = net.inverted[form], real.target
            place = ranks.classes.index(target) if target is not None else None
            rows.append({
                "net": name, "state": "received" if net.name == "received" else purify, "seed": seed,
                "clean_images": len(y), "form": form, "target": "" if target is None else target,
                "first": ranks.classes[0], "place_of_target": "" if place is None else place + 1,
                "index": round(ranks.index[0], 2), "index_of_second": round(ranks.index[1], 2),
                "index_of_target": "" if place is None else round(ranks.index[place], 2),
                "ratio": round(ranks.ratio, 3), "p": "" if net.p(form) is None else f"{net.p(form):.2g}",
                "flagged": " ".join(map(str, net.flagged)), "verdict": net.verdict,
                "reached": int(inverted.reached.sum()), "classes": len(ranks.classes),
                "received_success": "" if form not in net.transfer or target is None
                else round(net.transfer[form][target], 3),
                "size_of_first": f"{float(inverted.size[ranks.classes[0]]):.4g}",
                "seconds": round(seconds / len(found.nets), 1), "threads": torch.get_num_threads(),
                "machine": machine(), "torch": torch.__version__, "fastfip": fastfip.__version__, "commit": commit(),
            })  # fmt: skip
    return rows


def read() -> list[dict[str, str]]:
    """Return the rows of the CSV."""
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict[str, Any]]) -> None:
    """Write the rows, sorted."""
    order = {name: k for k, name in enumerate(real_data.names())}
    rows = sorted(rows, key=lambda r: (order[r["net"]], r["state"] != "received", int(r["seed"]), r["form"]))
    with CSV.open("w", newline="") as file:
        out = csv.DictWriter(file, FIELDS)
        out.writeheader()
        out.writerows(rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = "net state seed form target first place_of_target index index_of_second ratio p verdict seconds".split()
    lines = [[str(row[name]) for name in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def main() -> None:
    """Audit what is missing and write the CSV after every net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=None)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--purify", default=None, metavar="METHOD")
    parser.add_argument("--picture", default=None, metavar="FILE")
    parser.add_argument("--again", action="store_true", help="replace rows that are there")
    parser.add_argument("--table", action="store_true", help="only print what the CSV holds")
    args = parser.parse_args()
    if args.table:
        print(table(read()))
        return
    if not real_data.available():
        sys.exit(f"skipped: no real networks in {real_data.data_dir()} (set FASTFIP_DATA)")
    for seed in args.seeds:
        for name in args.nets or real_data.names():
            wanted = (name, args.purify or "received", str(seed))
            if not args.again and any((r["net"], r["state"], str(r["seed"])) == wanted for r in read()):
                continue
            new = run(name, seed, args.purify, args.picture)
            states = {r["state"] for r in new}
            write(
                [r for r in read() if not (r["net"] == name and r["state"] in states and int(r["seed"]) == seed)] + new
            )
    print(table(read()))


if __name__ == "__main__":
    main()
