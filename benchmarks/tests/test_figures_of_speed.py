"""Numbers on audits, the Fisher information and speed, in the sentences of the documents, are those of the rows."""

from __future__ import annotations

from benchmarks.tests.test_figures import GTSRB, L2INV, MNIST, NAD, rounded, rows, said

NETS = {
    GTSRB: "GTSRB BadNets",
    MNIST: "MNIST BadNets",
    NAD: "CIFAR-10 NAD (Wide ResNet)",
    "nad_cifar10_wrn16_1_erased": "CIFAR-10 NAD, as its authors cleaned it",
    L2INV: "CIFAR-10 l2inv",
    "clean_cifar10_resnet20": "clean ResNet-20",
}


def chance(p):
    """A chance with the digits that the table has."""
    if p == 1:
        return "1"
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.01 else f"{p:.2f}"


def test_the_tables_of_the_audit():
    for net, name in NETS.items():
        cells = []
        for form in ("patch", "additive"):
            (row,) = rows("audit", net=net, form=form, state="received")
            first = f"**{row['first']}**" if row["first"] == row["target"] and "cleaned" not in name else row["first"]
            ratio, index, p = (float(row[key]) for key in ("ratio", "index", "p"))
            cells.append((first, f"{ratio:.2f}", f"{index:.1f}", chance(p)))
        verdict = f"{row['flagged']} flagged" if row["flagged"] else row["verdict"]
        target = row["target"] or "none"
        target = f"was {target}" if "cleaned" in name else target
        patch = f"{cells[0][0]}: {cells[0][1]}, {cells[0][2]}, {cells[0][3]}"
        if net == GTSRB:
            patch = f"{cells[0][0]}: {cells[0][1]} of the median, index {cells[0][2]}, chance {cells[0][3]}"
        additive = f"{cells[1][0]}: {cells[1][1]}, {cells[1][2]}, {cells[1][3]}"
        said("docs/audit.md", f"| {name} | {row['classes']} | {target} | {patch} | {additive} | {verdict} |")
    for net, name in ((GTSRB, "GTSRB BadNets"), (MNIST, "MNIST BadNets"), (NAD, "CIFAR-10 NAD")):
        patch, additive = (rows("audit", net=net, form=form, state="fast_wfip")[0] for form in ("patch", "additive"))
        (before,) = rows("audit", net=net, form="patch", state="received")
        places = f"{patch['place_of_target']} / {additive['place_of_target']} of {patch['classes']}"
        sizes = f"{float(before['size_of_first']):.1f}, {float(patch['size_of_first']):.0f}"
        works = " / ".join(f"{100 * float(row['received_success']):.0f} %" for row in (patch, additive))
        verdicts = f"{before['flagged']} flagged | {patch['verdict']}"
        said("docs/audit.md", f"| {name} | {verdicts} | {places} | {sizes} | {works} |")


def test_the_margins():
    found = rows("audit_margins")
    bad, clean = ([row for row in found if (row["attack"] != "none") == backdoored] for backdoored in (True, False))
    seen = [row for row in bad if row["suspicious"] == "yes"]
    every = [row for row in bad if row["target"] == "next"]
    wrong = [row["net"] for row in clean if row["suspicious"] == "yes"]
    assert wrong == ["nad_cifar10_wrn16_1_erased"] and not any(row in seen for row in every)
    said(
        "docs/audit.md",
        f"**The threshold finds {len(seen)} of {len(bad)}** backdoors; five of the {len(bad)} are all-to-all.",
        f"It calls one of {len(clean)} clean networks suspicious",
    )
    assert len(every) == 5
    asr = {row["net"]: float(row["asr"]) for row in bad}
    said("docs/audit.md", f"learned to only {asr['own-digits-lira-2']:.0f} %", f"to {asr['gtsrb-badnets']:.0f} %")


def test_the_first_calls_of_the_fisher():
    both, trace = (rows("first_calls", way=way) for way in ("gradient and diagonal", "trace and its gradient"))
    first = [float(row["first"]) for row in both]
    later = max(float(row[key]) for row in both for key in ("second", "later"))
    assert later < 0.97 and {row["samples"] for row in trace} == {"4"}
    said(
        "docs/fisher.md",
        f"cost {min(first):.1f} to {max(first):.1f} plain passes in the first call",
        "and less than 0.97 in each later one",
        f"cost {max(float(row['first']) for row in trace):.1f} in the first call, and then "
        f"{float(trace[0]['later']):.1f} and {float(trace[1]['later']):.1f}",
    )


def test_two_threads_of_the_fisher_diagonal():
    for way, end in (("fastfip native", " on (a) to (e)"), ("fastfip with gradient", ".")):
        found = [rows("fisher_diagonal", workload=w, way=way, threads=2)[0] for w in "abcde"]
        said("docs/fisher.md", ", ".join(rounded(row["ratio"], 2) for row in found) + end)


def test_costs_of_the_trace():
    def ratio(workload, way, threads=1):
        (row,) = rows("fisher_trace", workload=workload, way="fastfip" if way == "exact" else way, threads=threads)
        return rounded(row["ratio"], 2)

    said(
        "docs/trace.md",
        f"| (a) MLP 784-1024-1024-10, N = 256 | {ratio('a', 'exact')} | {ratio('a', 'perturb')} | "
        f"{ratio('a', 'perturb central')} | {ratio('a', 'signs')} |",
        f"| (b) PreActResNet-18, N = 32 | {ratio('b', 'exact')} | - | - | - |",
        f"| (c) ViT-S/16, 224, N = 4, fused attention | {ratio('c', 'exact')} | {ratio('c', 'perturb')} | "
        f"{ratio('c', 'perturb central')} | {ratio('c', 'signs')} |",
    )


def test_performance():
    def step(net, way, key="ratio", threads=1):
        (row,) = rows("fast_fip", net=net, way=way, threads=threads)
        return f"{float(row[key]):.2f}"

    vit, resnet = "vit_s16", "preact_resnet18"
    k, trace = "fast_fip K=64", "fast_fip K=64, trace every fifth"
    affine, full = "fast_fip K=64, affine", "fast_fip full rank"
    compiled = "fast_fip K=64, compiled"

    def faster(net):
        return float(step(net, "released layers")) / float(step(net, k))

    random, decaying = (
        float(rows("spectral_setup", spectrum=s, way="iteration", threads=1)[0]["ratio"])
        for s in ("random", "decaying")
    )
    said(
        "docs/performance.md",
        f"on PreActResNet-18, where attention takes no part of the time, {step(resnet, k)} is",
        f"is {step(vit, k, 'memory')} of a plain step on ViT-S/16",
        f"and {step(resnet, k, 'memory')} on PreActResNet-18",
        f"its input for them: {step(resnet, affine, 'memory')} on PreActResNet-18",
        f"kept on ViT-S/16: {step(vit, full, 'memory')}",
        f"every fifth step it costs {step(resnet, trace)} and {step(vit, trace)} on one thread, and "
        f"{step(resnet, trace, threads=2)} and {step(vit, trace, threads=2)} on two",
        f"is {faster(vit):.1f} (ViT-S/16) to {faster(resnet):.1f} times (PreActResNet-18) as fast",
        f"costs about {step(resnet, 'fast_fip K=64, with trace')} (PreActResNet-18) and "
        f"{float(step(vit, 'fast_fip K=64, with trace')):.1f} (ViT-S/16",
        f"a step on ViT-S/16 takes {step(vit, compiled)} of the time of the compiled plain step and "
        f"{step(vit, compiled, 'memory')} of its peak memory",
        f"On PreActResNet-18 it takes {step(resnet, compiled)} and {step(resnet, compiled, 'memory')}",
        f"decaying spectra reach it ({decaying:.2f}), and random ones do not ({random:.2f})",
    )
