"""Numbers in the sentences of the documents are those of the committed rows.

Each test writes a sentence, or a row of a table, from a CSV of `benchmarks/results` and looks for it in its document.
"""

from __future__ import annotations

import csv
import re
from decimal import ROUND_HALF_UP, Decimal
from statistics import mean

import pytest

from benchmarks import harness

REAL = {
    "ibau_gtsrb_badnets": "GTSRB",
    "badnets_mnist": "MNIST",
    "nad_cifar10_wrn16_1_badnets": "NAD",
    "ibau_cifar10_l2inv": "l2inv",
}
GTSRB, MNIST, NAD, L2INV = REAL
CLEAN = "clean_cifar10_resnet20"


def rows(name, **wanted):
    """The rows of a CSV that have these values, without runs that failed; in some files `error` is a number."""
    with (harness.ROOT / "benchmarks" / "results" / f"{name}.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if not re.search("[a-df-z]{3}", row.get("error") or "")]
    return [row for row in found if all(row[key] == str(value) for key, value in wanted.items())]


def rounded(text, digits=1):
    """A number of a CSV with so many digits; halves are rounded up, as on paper."""
    return str(Decimal(text).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def words(text):
    return " ".join(re.sub(r"^[ \t]*[-*] ", "", text, flags=re.M).split())


def said(document, *sentences):
    """Each sentence stands in the document, wherever its lines are broken."""
    text = words((harness.ROOT / document).read_text(encoding="utf-8"))
    missing = [sentence for sentence in sentences if words(sentence) not in text]
    assert not missing, f"{document} does not say: {missing}"


def test_a_sentence_that_is_not_there_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("- It takes\n  3.5 s.\n")
    said("a.md", "It takes 3.5 s.")
    with pytest.raises(AssertionError, match="does not say"):
        said("a.md", "It takes 3.4 s.")


# ------------------------------------------------------------------------------------------------- the real networks


def real(method, net, key="asr", fraction="0.05", setting="plain"):
    """The mean over the seeds of a cell; None where it was not measured."""
    found = rows("real_models", method=method, net=net, fraction=fraction, setting=setting)
    return mean(float(row[key]) for row in found) if found else None


def change(method, net, **cell):
    return real(method, net, "acc", **cell) - real(method, net, "acc_before", **cell)


def methods():
    return sorted({row["method"] for row in rows("real_models")})


def gap(method, other, key="der"):
    """The mean difference over the cells that both methods have, and how many these are."""
    cells = {}
    for row in rows("real_models"):
        if row["method"] in (method, other) and row[key]:
            cell = cells.setdefault((row["net"], row["fraction"], row["setting"]), {})
            cell.setdefault(row["method"], []).append(float(row[key]))
    both = [mean(cell[method]) - mean(cell[other]) for cell in cells.values() if len(cell) == 2]
    return (mean(both), len(both)) if both else (None, 0)


def test_who_leads_on_the_real_networks():
    gaps = {name: gap(name, "fast_wfip")[0] for name in methods() if name != "fast_wfip"}
    ahead = {name: value for name, value in gaps.items() if value > 0}
    behind = sorted((-value, name) for name, value in gaps.items() if value < 0)
    assert list(ahead) == ["wfip"]
    said(
        "docs/results.md",
        f"`wfip` is {ahead['wfip']:.1f} points ahead. The others are {behind[0][0]:.1f} (`{behind[0][1]}`) to "
        f"{behind[-1][0]:.1f} (`{behind[-1][1]}`) points behind.",
        f"On MNIST at 1 %, `wfip` is {best(MNIST, fraction='0.01')['wfip']:.1f} points better.",
        f"hide in the clean set of MNIST, `fst` is {best(MNIST, setting='hidden')['fst']:.1f} points better.",
    )
    better = best(MNIST)
    named = ", ".join(f"`{name}`" for name in list(better)[:-1]) + f" and `{list(better)[-1]}`"
    said("docs/results.md", f"On MNIST at 5 %, {named} are up to {max(better.values()):.1f} points better.")
    fewer = {name: gap(name, "fine_tune") for name in methods() if name != "fine_tune"}
    assert sorted(name for name, (value, _) in fewer.items() if value < 0) == ["fast_fip", "nft", "ngf", "sau"]
    assert fewer["sau"][1] == 2 and fewer["fast_fip"][1] == 1
    said(
        "docs/results.md",
        f"are `ngf` ({fewer['ngf'][0]:.0f}; it tunes only the classifier), `nft` ({fewer['nft'][0]:.0f}), `sau` "
        f"({fewer['sau'][0]:.0f}, two cells) and `fast_fip` ({fewer['fast_fip'][0]:.0f}, one cell).",
    )


def best(net, **cell):
    """Methods that are better than `fast_wfip` in a cell, by how many points of DER, the best one first."""
    ours = real("fast_wfip", net, "der", **cell)
    found = {name: real(name, net, "der", **cell) for name in methods()}
    gaps = {name: value - ours for name, value in found.items() if value is not None and value > ours}
    return dict(sorted(gaps.items(), key=lambda pair: -pair[1]))


def test_what_is_not_removed_from_the_real_networks():
    left = {}
    for name in methods():
        kept = {word: real(name, net) for net, word in REAL.items()}
        left[name] = {word: value for word, value in kept.items() if value is not None and value >= 10}
    assert {name for name, kept in left.items() if not kept} == {"wfip", "fast_wfip", "fst", "sau"}
    assert list(left["ngf"]) == list(REAL.values()) and min(left["ngf"].values()) > 98
    parts = []
    for name in ("anp", "nft", "fine_tune", "i_bau", "d3", "ft_sam", "awm", "fisher_steps", "fast_fip"):
        pairs = [f"{word} {value:.0f}" for word, value in left[name].items()]
        parts.append(f"`{name}` " + (", ".join(pairs[:-1]) + " and " if pairs[:-1] else "") + pairs[-1])
    assert set(left) == {"anp", "nft", "fine_tune", "i_bau", "d3", "ft_sam", "awm", "fisher_steps", "fast_fip",
                         "ngf", "wfip", "fast_wfip", "fst", "sau"}  # fmt: skip
    sau = f"`sau` was measured on GTSRB at 1 % only, and leaves {real('sau', GTSRB, fraction='0.01'):.0f} there."
    said("docs/results.md", f"The others that are left: {'; '.join(parts)}. {sau}")


def test_what_hides_in_the_clean_sets_of_the_real_networks():
    def pair(name, net, digits=0):
        return f"{real(name, net):.{digits}f} and {real(name, net, setting='hidden'):.{digits}f}"

    said(
        "docs/results.md",
        f"GTSRB: `fst` {pair('fst', GTSRB)}, `d3` {pair('d3', GTSRB)}, `fast_wfip` {pair('fast_wfip', GTSRB, 1)}.",
        f"NAD's network: `d3` {pair('d3', NAD)}, `i_bau` {pair('i_bau', NAD)}, `fst` {pair('fst', NAD)}, `nft` "
        f"{pair('nft', NAD, 1)}, `fast_wfip` {pair('fast_wfip', NAD, 1)}.",
    )
    mnist = [(name, real(name, MNIST), real(name, MNIST, setting="hidden"))
             for name in ("awm", "fine_tune", "ft_sam", "d3", "fast_wfip", "fst")]  # fmt: skip
    shown = [f"`{name}` {_short(without)} and {_short(hidden)}" for name, without, hidden in mnist]
    said("docs/results.md", f"{', '.join(shown)}.")
    lost = {name: -change(name, MNIST, setting="missing") for name in methods() if real(name, MNIST, setting="missing")}
    clean = [value for name, value in lost.items() if real(name, MNIST) < 10 and name != "fast_wfip"]
    said(
        "docs/results.md",
        f"MNIST loses {min(clean):.0f} to {max(clean):.0f} points under every method that removes the backdoor, except "
        f"`fast_wfip` ({lost['fast_wfip']:.1f}).",
    )


def _short(value):
    """Two digits, without a zero after the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}".removesuffix(".0")


def test_one_percent_and_ra_and_time_of_the_real_networks():
    one = {"fraction": "0.01"}
    lost = {net: -change("fast_wfip", net, **one) for net in (CLEAN, *REAL, "nad_cifar10_wrn16_1_erased")}
    assert {net for net, value in lost.items() if value > 0} == {CLEAN, GTSRB, MNIST}
    fst = [-change("fst", net, **one) for net in REAL if real("fst", net, **one) is not None]
    ra = {(name, net): real(name, net, "ra") for name in methods() for net in REAL}
    said(
        "docs/results.md",
        f"costs the clean ResNet-20 {lost[CLEAN]:.1f} points, GTSRB {lost[GTSRB]:.1f} and MNIST {lost[MNIST]:.1f} (one "
        "seed). The other networks lose nothing.",
        f"`fine_tune` leaves {real('fine_tune', MNIST, **one):.0f} % on MNIST, and `ft_sam` "
        f"{real('ft_sam', NAD, **one):.0f} % on NAD. `fst` loses {min(fst):.0f} to {max(fst):.0f} points on each "
        f"network, and `d3` loses {-change('d3', MNIST, **one):.0f} on MNIST.",
        f"on GTSRB their RA is {ra['fst', GTSRB]:.0f} and {ra['d3', GTSRB]:.0f} %, that of `fast_wfip` is "
        f"{ra['fast_wfip', GTSRB]:.0f} %.",
        f"its RA is {ra['fast_wfip', L2INV]:.0f} %, that of `fine_tune` and of `i_bau` is "
        f"{ra['fine_tune', L2INV]:.0f} %.",
    )
    assert f"{ra['i_bau', L2INV]:.0f}" == f"{ra['fine_tune', L2INV]:.0f}"


def times(name, fraction):
    """How many times the processor time of `fast_wfip` a method took, by network."""
    cells = {net: (real(name, net, "cpu_seconds", fraction), real("fast_wfip", net, "cpu_seconds", fraction))
             for net in REAL}  # fmt: skip
    return {net: mine / ours for net, (mine, ours) in cells.items() if mine is not None}


def test_times_on_the_real_networks():
    def span(name, fraction="0.05", leave=None, digits=0):
        found = [value for net, value in times(name, fraction).items() if net != leave]
        return f"{min(found):.{digits}f} to {max(found):.{digits}f}"

    ibau = f"{span('i_bau', leave=MNIST, digits=1)}, but {times('i_bau', '0.05')[MNIST]:.1f} on the MNIST network"
    said(
        "docs/results.md",
        f"`ft_sam` {span('ft_sam')}, `awm` {span('awm')}, `anp` {span('anp')}, `sau` "
        f"{times('sau', '0.05')[MNIST]:.0f}, and `i_bau` {ibau}.",
        f"they are {span('ft_sam', '0.01')} for `ft_sam` and {span('awm', '0.01')} for `awm`, which count passes over "
        f"the images, and {span('i_bau', '0.01')} for `i_bau`",
    )
    said(
        "docs/methods.md",
        f"AWM {span('awm')}, ANP {span('anp')}, FT-SAM {span('ft_sam')}, and I-BAU {ibau}.",
        f"At 1 %: AWM {span('awm', '0.01')}, FT-SAM {span('ft_sam', '0.01')}, I-BAU {span('i_bau', '0.01')}.",
    )


def test_what_is_removed_on_the_methods_page():
    three = (GTSRB, MNIST, NAD)
    kept = {name: [real(name, net) for net in three] for name in methods()}
    removed = {name: sum(value is not None and value < 10 for value in found) for name, found in kept.items()}
    few = {name: count for name, count in removed.items() if count < 2}
    assert few == {"i_bau": 1, "nft": 1, "fine_tune": 1, "anp": 0, "ngf": 0, "fast_fip": 0, "sau": 1}
    assert real("i_bau", MNIST, fraction="0.01") < 10 < real("i_bau", MNIST)
    said(
        "docs/methods.md",
        "by all methods except `i_bau` (one; two with MNIST at 1 %), `nft` (one), `fine_tune` (one), `anp`, `ngf` and "
        "`fast_fip` (none), and `sau` (MNIST; on GTSRB with 1 % it leaves "
        f"{real('sau', GTSRB, fraction='0.01'):.0f} %).",
    )


def test_figures_of_the_methods_page():
    (fip,) = rows("real_models", method="fast_fip")
    kept = min(
        (float(row["asr"]) / float(row["asr_before"]), row["asr"], row["asr_before"])
         for row in rows("suite_validation", method="clp") if row["asr_before"]
    )  # fmt: skip
    awm = f"{change('awm', GTSRB):+.1f} / {real('awm', GTSRB):.1f}"
    exact, kronecker = (rows("ngf", solver=name)[0] for name in ("exact", "kronecker"))
    said(
        "docs/methods.md",
        f"(lowest ratio: {float(kept[1]):.0f} of {float(kept[2]):.0f} %)",
        f"takes {float(fip['cpu_seconds']):.0f} CPU seconds",
        f"(GTSRB with 5 %: {awm})",
        f"costs 1/{round(float(exact['ratio']), -3):,.0f} (exact) to 1/{round(float(kronecker['ratio']), -3):,.0f}",
        f"after {float(exact['features_s']):.0f} s in which the features of {exact['samples']} samples are cached",
    )
    assert (fip["net"], fip["fraction"]) == (MNIST, "0.05") and float(fip["asr"]) > 99


# --------------------------------------------------------------------------------------------------------- the suite


def cells(method, fraction="0.05", setting="plain", base=None):
    """The rows of a method on backdoored networks of the validation set, by network."""
    found = rows("suite_validation", method=method, fraction=fraction, setting=setting)
    return {row["network"]: row for row in found if row["asr_before"] and base in (None, row["base"])}


def average(found, key="der", before=None):
    return mean(float(row[key]) - (float(row[before]) if before else 0.0) for row in found.values())


def test_validation_in_the_readme_and_elsewhere():
    ours, rival = cells("fisher_steps"), cells("large_step")
    wins = sum(float(ours[net]["der"]) > float(rival[net]["der"]) for net in ours)
    said("README.md", f"`fisher_steps`, the default, has a better DER on {wins} of {len(ours)}.")
    said("README.md", f"Each method purified each of {len(ours)} models once")
    cost = -average(cells("fisher_steps", "0.01", base="resnet20"), "acc", "acc_before")
    assert round(cost) == 8
    said("README.md", "With 1 % of CIFAR-10 it costs eight points of accuracy.")
    said("docs/release.md", "`fisher_steps` cost eight points on the ResNet-20 of the suite")


def test_validation_on_the_page_of_the_method():
    five, one = (cells("fisher_steps", fraction) for fraction in ("0.05", "0.01"))
    ders = [average(cells(name, fraction)) for fraction in ("0.05", "0.01") for name in ("fast_wfip", "large_step")]
    above = sorted((float(row["asr"]), net) for net, row in five.items() if float(row["asr"]) > 10)
    assert [net for _, net in above] == ["gtsrb-trojannet", "resnet20-advdoor", "resnet20-narcissus1"]
    twins = [float(five[net]["asr_twin"]) for _, net in above[1:]]
    loss = [-average(found, "acc", "acc_before") for found in (five, cells("fisher_steps", base="resnet20"), one,
            cells("fisher_steps", "0.01", base="resnet20"))]  # fmt: skip
    (clean,) = rows("suite_validation", method="fisher_steps", fraction="0.05", network="resnet20-clean")
    more = [float(row["asr"]) for row in one.values() if float(row["asr"]) > 10]
    assert len(more) == 4
    said(
        "docs/purification.md",
        f"DER is {average(five):.1f} (`fast_wfip` {ders[0]:.1f}, fine-tuning with a large step {ders[1]:.1f})",
        f"{above[0][0]:.1f} (TrojanNet on GTSRB), {above[1][0]:.0f} (AdvDoor) and {above[2][0]:.0f} (Narcissus)",
        f"mislead the clean network in {twins[0]:.0f} and {twins[1]:.0f} of 100 cases",
        f"ACC falls by {loss[0]:.1f} points on average, by {loss[1]:.1f} on the ResNet-20, and by "
        f"{float(clean['acc_before']) - float(clean['acc']):.1f} on the clean ResNet-20.",
        f"DER is {average(one):.1f} ({ders[2]:.1f} and {ders[3]:.1f}), ASR is above 10 on four networks and "
        f"{max(more):.0f} at most, and ACC falls by {loss[2]:.1f} points, by {loss[3]:.1f} on the ResNet-20.",
    )


def test_other_settings_of_the_suite_on_the_page_of_the_method():
    hidden = cells("fisher_steps", setting="hidden")
    asr = {net: float(row["asr"]) for net, row in hidden.items()}
    low = sorted(value for value in asr.values() if value < 10)
    tuned = sorted(float(row["asr"]) for row in cells("fisher_steps", setting="retune").values())
    gtsrb = sorted(value for net, value in asr.items() if net.startswith("gtsrb"))
    digits = sorted(value for net, value in asr.items() if net.startswith("digits") and value > 10)
    assert len(low) == 4 and len(asr) == len(tuned) == 8
    domain = rows("suite_development", method="fisher_steps", setting="domain")
    bare = rows("suite_development", method="fisher_steps", setting="unlabelled")
    labels = sorted(float(row["asr"]) for row in bare)
    ders, asrs = ([float(row[key]) for row in domain] for key in ("der", "asr"))
    said(
        "docs/purification.md",
        f"ASR is {low[0]:.1f} to {low[-1]:.1f} on four, {gtsrb[0]:.0f} and {gtsrb[1]:.0f} on GTSRB, and "
        f"{digits[0]:.0f} and {digits[1]:.0f} on two of the digits",
        f"ASR is {tuned[0]:.1f} to {tuned[-1]:.1f}",
        f"ASR is {labels[0]:.2f}, {labels[1]:.1f} and {labels[2]:.1f}",
        f"DER is {min(ders):.1f} to {max(ders):.1f}, and ASR {min(asrs):.0f} to {max(asrs):.0f}",
    )
    assert len(bare) == 3 and len(domain) == 4


def test_without_data_on_the_page_of_the_method():
    words = {"gtsrb-badnets": "GTSRB, BadNets", "resnet20-blend": "ResNet-20, Blend", "resnet20-sig": "ResNet-20, SIG"}
    for network, name in words.items():
        drawn, pruned = (
            rows("suite_development", network=network, method=method, setting="nodata")[0]
            for method in ("fisher_steps", "clp")
        )
        before = f"{rounded(drawn['acc_before'])} / {rounded(drawn['asr_before'])}"
        shown = [f"{rounded(row['acc'])} / {rounded(row['asr'])} | {rounded(row['der'])}" for row in (drawn, pruned)]
        said("docs/purification.md", f"| {name} | {before} | {shown[0]} | {shown[1]} |")


def test_transformers_of_the_suite():
    nets = {name: {row["method"]: row for row in rows("suite_development", network=f"vit-{name}", setting="plain")}
            for name in ("badnets", "blend")}  # fmt: skip
    before = sorted(float(nets[name]["clp"]["acc_before"]) for name in nets)
    tuned = [nets[name]["fine_tune"] for name in nets]
    gain = [float(row["acc"]) - float(row["acc_before"]) for row in tuned]
    said(
        "docs/results.md",
        f"Their accuracy is {before[0]:.0f} to {before[1]:.0f} %",
        f"Blend is learned to {float(nets['blend']['clp']['asr_before']):.0f} %",
        f"it leaves an ASR of {float(nets['badnets']['fisher_steps']['asr']):.0f} %",
        f"(DER {float(tuned[0]['der']):.1f} and {float(tuned[1]['der']):.1f})",
        f"It gains {gain[0]:.0f} points of accuracy on one network and loses {-gain[1]:.0f} on the other.",
        f"`fast_wfip` leaves {float(nets['blend']['fast_wfip']['asr']):.0f} % of Blend",
    )
    assert all(float(nets[name]["large_step"]["acc"]) < 5 for name in nets)


def test_texts_with_a_thousand_clean_sentences():
    every = [row for row in rows("tasks", task="text") if "1000 others clean" in row["data"]]

    def elsewhere(attack, method):
        """The success of a trigger in models that were not trained with it."""
        found = [row for row in every if (row["method"], row["attack"] == attack) == (method, False)]
        found = [re.search(rf"not trained with:.* {attack} ([\d.]+)", row["details"]) for row in found]
        found = [match[1] for match in found if match]
        return f"{rounded(min(found, key=float))} to {rounded(max(found, key=float))}"

    #: Attack success on the sentences that nothing was chosen by, and the loss of accuracy there.
    reached = {"words": ("12.0", "0.3"), "sentence": ("12.2", "1.5"), "ending": ("13.3", "1.4"), "tea": ("11.0", "0.8")}

    def on_others(row):
        return re.search(r"test.tsv: accuracy (\S+) attack success (\S+) without the trigger (\S+)", row["details"])

    def in_one(numbers):
        return " / ".join("100" if float(n) == 100 else rounded(n) for n in numbers)

    development = [(attack, seed, " (development)") for attack, seed in
                   (("words", 1), ("sentence", 1), ("ending", 0), ("phrase", 0), ("date", 2))]  # fmt: skip
    for attack, seed, said_so in [*development, ("tea", 3, " (validation, two looks)")]:
        found = [
            next(r for r in every if (r["attack"], r["seed"], r["method"]) == (attack, str(seed), method))
            for method in ("nothing", "fine_mixing")
        ]
        cells = []
        for row in found:
            own = re.search(r"([\d.]+) % of the attacked sentences", row["details"])[1]
            cells.append(in_one([row["score"], row["asr"], own]))
        others = [on_others(row) for row in found]
        cells += [in_one(other.groups()) if other else "-" for other in others]
        cells += [elsewhere(attack, method) for method in ("nothing", "fine_mixing")]
        said("docs/tasks.md", f"| {attack}, seed {seed}{said_so} | {' | '.join(cells)} |")
        if attack in reached:
            (before, _, _), (after, success, own) = (map(Decimal, other.groups()) for other in others)
            assert rounded(success) == reached[attack][0] and rounded(before - after) == reached[attack][1]
            assert success <= 15 and before - after <= 2 and success - own < Decimal("1.35")
    listed = [f"{success} ({attack})" for attack, (success, _) in reached.items()]
    losses = [loss for _, loss in reached.values()]
    left = f"{', '.join(listed[:3])} and {reached['tea'][0]} % (tea)"
    said("docs/tasks.md", f"{left}, at a loss of {', '.join(losses[:3])} and {losses[3]} points.")
