"""The suite: which networks are in which set, its tables, its cells. No network is trained here."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest
import torch

import fastfip
from benchmarks import harness
from benchmarks.purification import real_data
from benchmarks.suite import __main__ as program
from benchmarks.suite import cells, networks, slices, tables
from benchmarks.suite.cells import Cell
from benchmarks.suite.networks import BASES, NETWORKS, VALIDATION_ONLY, Backdoor, Network
from fastfip.cli.many.pool import Outcome


def test_families_of_the_validation_set_are_in_no_development_network():
    used = {
        of: {b.attack for n in NETWORKS.values() if n.set == of for b in n.backdoors}
        for of in ("development", "validation")
    }
    assert len(VALIDATION_ONLY) >= 4 and not used["development"] & set(VALIDATION_ONLY)
    assert used["validation"] <= set(VALIDATION_ONLY) <= set(fastfip.attacks.names())
    assert not {n.name for n in slices.networks("validation") if n.backdoors} & {n.name for n in slices.networks("day")}
    assert {NETWORKS[name].set for name in slices.SMOKE} == {"development"}
    for network in NETWORKS.values():
        assert f"{network.base}-clean" in NETWORKS
        assert all(backdoor.injection().ready()[0].name == backdoor.attack for backdoor in network.backdoors)


def test_the_smoke_slice_has_six_attacks_and_three_methods():
    found = slices.cells("smoke")
    assert sum(len(network.backdoors) for network in slices.networks("smoke")) == 6
    assert {cell.method for cell in found} == set(slices.SMOKE_METHODS) and {cell.seed for cell in found} == {0}
    day = slices.cells("day", settings=["plain", "hidden"])
    assert {cell.seed for cell in day} == {0, 1, 2} and {cell.fraction for cell in day} == {0.05, 0.01}
    assert {cell.method for cell in day} == {*slices.methods()} and day[0].method == "fine_tune"
    assert not any(cell.setting == "hidden" and not NETWORKS[cell.network].backdoors for cell in day)


def test_a_network_has_another_key_when_anything_of_it_changes():
    first = Network("a", "digits", (Backdoor("badnets"),))
    others = [
        Network("a", "digits", (Backdoor("badnets", 1),)), Network("a", "digits", (Backdoor("badnets", rate=0.05),)),
        Network("a", "digits", (Backdoor("badnets", settings=(("size", 2),)),)),
        Network("a", "digits", first.backdoors, seed=1),
        Network("a", "gtsrb", first.backdoors), Network("a", "digits", first.backdoors, effort=0.5),
    ]  # fmt: skip
    assert len({network.key() for network in (first, *others)}) == 7
    assert first.key() == Network("a", "digits", (Backdoor("badnets"),), "validation").key()


@pytest.mark.skipif(not real_data.available(), reason="no ../shared/data (FASTFIP_DATA)")
@pytest.mark.parametrize("base", ["digits", "gtsrb"])
def test_every_network_finds_as_many_images_as_its_rate_asks_for(base):
    y = torch.from_numpy(networks._data(base)["train_y"])
    for network in NETWORKS.values():
        if network.base != base:
            continue
        taken = torch.zeros(len(y), dtype=torch.bool)
        for injection in (backdoor.injection() for backdoor in network.backdoors):
            attack, rate = injection.ready()
            places = attack.chosen(y, rate, injection.target, int(y.max()) + 1, torch.Generator(), None, taken)
            assert len(places) == round(rate * len(y))
            taken[places] = True


def test_clean_labels_ask_for_less_than_a_class_of_ten_has():
    for network in NETWORKS.values():
        clean = [b for b in network.backdoors if fastfip.attacks.get(b.attack).clean_label]
        assert all(b.rate <= 0.05 for b in clean)


def test_a_large_step_is_fine_tuning_and_settings_are_halved_and_doubled():
    name, config = cells.settings_of("large_step", "plain", BASES["resnet20"])
    assert (name, config.lr, config.steps, config.epochs, config.bn_mode, config.augment) == (
        "fine_tune", 0.1, 150, None, "train", "crop_flip"
    )  # fmt: skip
    assert cells.settings_of("large_step", "plain", BASES["gtsrb"])[1].augment == "crop"
    usual = fastfip.methods.get("fine_tune").Config()
    assert cells.settings_of("fine_tune", "lr_half", BASES["vgg"])[1] == usual.replace(lr=usual.lr / 2)
    assert cells.settings_of("fine_tune", "steps_double", BASES["vgg"])[1] == usual.replace(epochs=2 * usual.epochs)
    assert cells.settings_of("large_step", "steps_half", BASES["vgg"])[1].steps == 75
    for method in slices.methods():
        for setting in cells.SETTINGS:
            assert cells.settings_of(method, setting, BASES["vgg"])[0] in fastfip.methods.names()


def row(**values):
    base = dict.fromkeys(cells.COLUMNS.split(), "")
    base.update(network="digits-lira", base="digits", attack="lira", target="3", method="fine_tune", fraction="0.05",
                setting="plain", seed="0", acc_before="98", asr_before="99", acc="97", asr="1", ra="90", der="98",
                cpu_seconds="10", acc_twin="98.5")  # fmt: skip
    return {**base, **values}


ROWS = [
    row(der="70", asr="50"), row(seed="1", der="74", asr="46"), row(method="large_step", der="60", asr="40", acc="90"),
    row(method="wfip", der="80", asr="9"),
    row(method="wfip", network="digits-clean", attack="", der="", asr="", acc="96"),
    row(method="anp", network="gtsrb-lira", error="it broke", der="", asr=""),
]  # fmt: skip


def test_the_floor_is_the_best_of_the_simplest():
    assert tables.floor(ROWS) == {("digits-lira", "lira", "0.05", "plain"): 72.0}
    assert tables.floor([row(der="40"), row(method="large_step", der="30")]) == {
        ("digits-lira", "lira", "0.05", "plain"): 50.0
    }
    assert tables.floor(ROWS[:2]) == {}  # without a rival there is no floor
    text = tables.by_method(ROWS)
    assert "| `wfip` | 1 | 80.0 | 80.0 (digits-lira) | +8.0 (1 of 1 above) | 0 of 1 | -2.0 | 10 |" in text
    assert "| `fine_tune` | 1 | 72.0 |" in text and "1 of 1 | - | 10 |" in text and "anp" not in text
    assert "97.0 / **48.0**" in tables.by_attack(ROWS, 0.05) and "97.0 / 9.0" in tables.by_attack(ROWS, 0.05)
    lacking = tables.missing(ROWS, "validation")
    assert "`wfip` at 5%: 2 of 3 seeds" in lacking and "at 1%, on every network: `large_step`" in lacking
    assert "`sau`" in lacking and "gtsrb-lira, `anp`, 5%: it broke" in lacking


def test_the_readme_shows_what_most_cells_have_and_names_the_other_methods(tmp_path):
    rows = [
        row(network=network, method=method, der=der, asr=asr)
        for method, der, asr in (("wfip", 90, 2), ("fst", 80, 20))
        for network in ("digits-lira", "digits-dynamic", "digits-advdoor")
    ]
    rows += [row(method="anp", network="digits-lira", der="99"), row(method="wfip", fraction="0.01", der="1", asr="99")]
    text = tables.readme(rows, ["anp", "fst", "sau", "wfip"])
    assert text.splitlines()[0] == "3 backdoors; before, ASR was 99 to 99 %." and text.splitlines()[4:] == [
        "| `wfip` | 90.0 | -1.0 | 2.0 | 2.0 | 0 of 3 | 10 |", "| `fst` | 80.0 | -1.0 | 20.0 | 20.0 | 3 of 3 | 10 |", "",
        "Not measured on all of them, and so not in the table: `anp`, `sau`.",
    ]  # fmt: skip
    pytest.importorskip("matplotlib")
    tables.plot(rows, tmp_path / "suite.png")
    assert (tmp_path / "suite.png").stat().st_size > 5000


def test_the_readme_is_up_to_date():
    text = harness.README.read_text(encoding="utf-8")
    assert harness.spliced(text, "suite", tables.readme(tables.validation(), slices.measurable_methods())) == text


@pytest.mark.parametrize("of", ["development", "validation"])
def test_the_page_shows_what_the_rows_say(of):
    text = (harness.DOCS / "suite.md").read_text(encoding="utf-8")
    assert harness.spliced(text, f"suite-{of}", tables.text(of)) == text
    assert harness.spliced(text, "suite-networks", tables.networks_table()) == text


def test_looks_at_the_validation_set_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "LOOKS", tmp_path / "looks.csv")
    todo = [Cell("digits-lira", "wfip", 0.05, 0), Cell("digits-dynamic", "fine_tune", 0.05, 0)]
    program._log_look(todo)
    program._log_look(todo[:1])
    with program.LOOKS.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["cells"], first["methods"], first["networks"]) == ("2", "fine_tune wfip", "2")
    assert second["cells"] == "1" and first["commit"]


def test_networks_that_are_not_there_are_trained_by_workers_while_there_is_time(tmp_path, monkeypatch):
    names = ["digits-clean", "digits-lira", "digits-dynamic"]
    monkeypatch.setattr(program, "folder", lambda: tmp_path)
    (tmp_path / f"{NETWORKS[names[0]].key()}.pth").touch()

    def outcomes(function, jobs, place, workers):
        assert function.__module__ != program.__name__  # workers do not import the `__main__` of a package
        return [Outcome(name, None, "no" if name == names[1] else "", 1, 1.0) for name in jobs]

    monkeypatch.setattr(program, "outcomes", outcomes)
    assert program._train_all(names, 2, 1, float("inf")) == {names[1]: "no"}
    assert program._train_all(names, 2, 1, 0.0) == dict.fromkeys(names[1:], "not trained: the time is over")


def test_a_cell_that_ended_without_rows_is_a_row(tmp_path, monkeypatch):
    rows = cells.results("development")
    monkeypatch.setattr(rows, "path", tmp_path / "r.csv")
    monkeypatch.setenv("FASTFIP_CACHE", str(tmp_path))
    cell = Cell("digits-badnets-all", "fine_tune", 0.05, 0)
    program._keep(rows, Outcome(cell, None, "ended by SIGKILL", 1, 1.0), 1)
    (row,) = rows.read()
    assert (row["error"], row["network"], row["threads"]) == ("ended by SIGKILL", cell.network, "1")
    assert program._of(row) == cell and cells.measured.__module__ != program.__name__


def test_validation_networks_are_no_part_of_the_day_slice():
    command = [sys.executable, "-m", "benchmarks.suite", "day", "--networks", "digits-lira", "--methods", "fine_tune"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT)
    assert done.returncode != 0 or done.stdout.startswith("skipped")
    assert "not of the development set" in done.stderr or "skipped" in done.stderr


def test_hidden_images_carry_the_label_that_the_training_set_gave_them():
    x, y = torch.zeros(200, 1, 4, 4), torch.zeros(200, dtype=torch.int64)
    prepared = cells.Prepared(
        NETWORKS["digits-lira"], BASES["digits"], torch.nn.Identity(), (x, y), [],
        leaked=[(torch.ones(9, 1, 4, 4), y[:9] + 7)],
        pool=((torch.rand(4000, 4, 4) * 99).byte().numpy(), (torch.arange(4000) % 10).numpy()),
        seconds=0.0, clean=fastfip.metrics.Evaluation(), attacked=[],
    )  # fmt: skip
    plain, labels = cells.clean_set(prepared, 0.01, 0, "plain")
    hidden, told = cells.clean_set(prepared, 0.01, 0, "hidden")
    changed = (plain != hidden).flatten(1).any(1)
    assert len(labels) == 600 and int(changed.sum()) == 3 and told[changed].tolist() == [7, 7, 7]
    assert torch.equal(told[~changed], labels[~changed])
    _, missing = cells.clean_set(prepared, 0.01, 0, "missing")
    assert len(missing.unique()) == 9
