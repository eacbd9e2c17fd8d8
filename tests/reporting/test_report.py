"""The report: a page and JSON with one content, safe with names from strangers' files, readable by everybody."""

import base64
import io
import json
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastfip
from fastfip.auditing.anomaly import anomaly
from fastfip.auditing.result import Audit, NetAudit, Retuning
from fastfip.comparison.result import Comparison, Row
from fastfip.errors import DataError
from fastfip.metrics import Evaluation
from fastfip.purification.result import Coverage, PurifyResult
from fastfip.reporting.document import Origin, schema
from fastfip.reporting.html import page
from fastfip.reporting.pictures import as_image, as_png, of_change, of_input, shrunk
from fastfip.worst_case.inversion import Inverted
from tests.support import schema as checker
from tests.support.small_nets import conv_net, data, loader

ROOT = Path(__file__).resolve().parents[2]
#: A name as a hostile file may have it: markup, an escape sequence, a mark that turns the direction of writing.
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=y>\x1b[31m\u202e{{ 7*7 }}"
VOID = {"meta", "img", "br", "circle", "line", "rect", "polyline", "polygon"}


class Page(HTMLParser):
    """What a page has: its tags in order with their attributes, its text, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.text += text

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def purified(**options):
    changes = [of_change(np.eye(8, dtype=np.float32) * k) for k in (1, 2)]
    values = {
        "model": nn.Linear(2, 3),
        "method": "fast_wfip",
        "before": Evaluation(0.9, 1.0, 0.0, 0.1, None, 20, 10, per_class=((0, 10, 10), (1, 8, 10))),
        "after": Evaluation(0.5, 0.05, 0.9, 0.2, None, 20, 10, per_class=((0, 1, 10), (1, 9, 10))),
        "history": [{"epoch": k, "step": k, "lr": 0.1, "loss": 1 / k, "score": 2 / k} for k in (1, 2, 3)],
        "seconds": {"search": 0.5, "train": 1.5, "total": 2.5},
        "peak_memory": 300 * 2**20,
        "settings": {
            "clean_samples": 50, "left_out_samples": 3, "heldout_samples": 0, "best_epoch": 3, "config": {"lr": 0.05},
            "inputs": {"shape": [1, 8, 8], "dtype": "float32", "of": 8, "low": 0.0, "high": 1.0,
                       "mean": 0.5, "std": 0.2},
            "images": {"formula": "x/255", "scale": "01", "mean": [], "std": [], "size": None, "channels": None,
                       "class_order": "text", "classes": ["cat", EVIL]},
            "classes": 3,
        },
        "versions": {"torch": "2.13"},
        "notes": [EVIL],
        "alerts": [f"RUINED {EVIL}"],
        "coverage": Coverage(("weight",), {"bias": EVIL}, 6, 9),
        "found": {
            "changes": {"classes": [1, 0], "success": [0.9, 0.2], "size": 0.3, "bound": [b for _, b in changes],
                        "pictures": np.stack([p for p, _ in changes])},
            "left_out": {"labels": [1], "pictures": np.zeros((1, 8, 8), dtype=np.uint8)},
        },
        "origin": Origin([{"name": EVIL, "sha256": "0" * 64, "bytes": 4096}], EVIL, {"clean": EVIL}, f"fastfip {EVIL}"),
    }  # fmt: skip
    return PurifyResult(**{**values, **options})


def audited():
    net = {}
    for name in ("received", "purified"):
        size = torch.tensor([0.1, 1.0, 1.1, 0.9, 1.05, 0.95])
        moved = torch.rand(6, 3, 5, 5)
        reached = torch.ones(6, dtype=torch.bool)
        one = Inverted("patch", torch.arange(6), size, torch.full((6,), 0.9), reached, moved, moved[0], None, None)
        net[name] = NetAudit(name, {"patch": one}, {"patch": anomaly(range(6), size, reached)}, None)
    net["purified"].transfer["patch"] = [0.1] * 6
    settings = {"samples": 10, "reach": 0.9, "level": 0.05, "smaller": 0.5, "classes": 6, "steps": 5, "seed": 0}
    return Audit(net["received"], net["purified"], Retuning(((0, 0.1), (5, 0.9)), 4), settings, 2.0, [EVIL])


def compared():
    rows = [Row("none", "none", 0, test_acc=0.9, test_asr=1.0, clean_samples=50, seconds=0.0)]
    rows += [Row("m", EVIL, s, test_acc=0.8, test_asr=0.1 * s, seconds=2.0, config={"lr": EVIL}) for s in (0, 1)]
    return Comparison([*rows, Row("x", "x", 0, error=EVIL)], notes=[EVIL])


RESULTS = {"purify": purified, "audit": audited, "compare": compared}
each = pytest.mark.parametrize("kind", RESULTS)


@each
def test_the_page_is_made_of_the_json_and_of_nothing_else(kind, tmp_path):
    result = RESULTS[kind]()
    document = result.document()
    result.document = lambda: document  # of one moment
    assert result.report(tmp_path / "a.json") == tmp_path / "a.json"
    result.report(tmp_path / "a.HTML")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read == document and read["kind"] == kind
    assert page(read) == (tmp_path / "a.HTML").read_text()


@each
def test_the_json_has_the_form_of_its_schema(kind):
    document = json.loads(json.dumps(RESULTS[kind]().document(), allow_nan=False))
    assert checker.errors(document, schema()) == []
    for name in schema()["required"]:
        assert checker.errors({k: v for k, v in document.items() if k != name}, schema()), name
    broken = {"purify": ("before", {}), "audit": ("received", {}), "compare": ("rows", [{}])}[kind]
    assert checker.errors({**document, broken[0]: broken[1]}, schema())
    try:
        import jsonschema
    except ImportError:
        return
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(document, schema())


@each
def test_text_from_files_is_shown_and_does_nothing(kind):
    text = page(RESULTS[kind]().document())
    shown = Page(text)
    assert "alert(1)" in shown.text and "{{ 7*7 }}" in shown.text and "49" not in re.findall(r"\{\{.*?\}\}", shown.text)
    assert not shown.all("script") and not [a for _, attributes in shown.tags for a in attributes if a.startswith("on")]
    assert "\x1b" not in text and "\u202e" not in text
    assert {image["src"][:22] for image in shown.all("img")} <= {"data:image/png;base64,"}


@each
def test_a_page_loads_nothing_from_elsewhere(kind):
    shown = Page(page(RESULTS[kind]().document()))
    links = [
        v for _, attributes in shown.tags for k, v in attributes.items() if k in ("src", "href", "action", "srcset")
    ]
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"link", "iframe", "object", "form", "base"} & {tag for tag, _ in shown.tags}
    policy = next(m["content"] for m in shown.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy
    css = (ROOT / "fastfip/reporting/templates/report.css").read_text()
    assert "url(" not in css and "@import" not in css


@each
def test_tables_headings_and_pictures_can_be_read_by_a_screen_reader(kind):
    shown = Page(page(RESULTS[kind]().document()))
    assert shown.all("html")[0]["lang"] == "en" and len(shown.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:])), levels
    assert all("scope" in cell for cell in shown.all("th"))
    assert len(shown.all("caption")) == len(shown.all("table"))
    assert all(image["alt"] for image in shown.all("img"))
    assert all((svg.get("role") == "img" and svg["aria-label"]) or svg.get("aria-hidden") for svg in shown.all("svg"))
    names = [attributes["id"] for _, attributes in shown.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert {attributes["aria-labelledby"] for _, attributes in shown.tags if "aria-labelledby" in attributes} <= set(
        names
    )


def test_the_page_serves_light_dark_phone_and_paper():
    css = (ROOT / "fastfip/reporting/templates/report.css").read_text()
    for words in ("prefers-color-scheme: dark", "@media print", ".wide { overflow-x: auto", "max-width: 34rem"):
        assert words in css
    shown = Page(page(purified().document()))
    assert any(m.get("content") == "width=device-width, initial-scale=1" for m in shown.all("meta"))
    tables = [place for place, (tag, _) in enumerate(shown.tags) if tag == "table"]
    assert all(shown.tags[place - 1][1].get("class") == "wide" for place in tables)


def test_alerts_come_first_and_everything_asked_for_is_there():
    text = Page(page(purified().document())).text
    order = [text.index(words) for words in ("Read this first", "Before and after", "What to do next",
             "What could not be known", "What was received", "Accuracy by class", "What was searched and found",
             "Samples left out", "Course of the purification", "Which parameters were tuned", "Time and memory",
             "Do it again")]  # fmt: skip
    assert order == sorted(order)
    for words in ("90.00 %", "69.9 to 97.2 %", "SHA-256 " + "0" * 64, "4 KiB", "x/255", "1 x 8 x 8", "300 MiB",
                  "cat", "Do not use this model", "there is no certificate", "sends 90 % of the samples there",
                  "other than the one"):  # fmt: skip
        assert words in text, words


def test_classes_that_changed_by_more_than_chance_are_marked():
    rows = purified().document()["classes"]
    assert [(row["label"], row["samples"], row["before"], row["after"], row["apart"]) for row in rows] == [
        (0, 10, 1.0, 0.1, True), (1, 10, 0.8, 0.9, False)
    ]  # fmt: skip
    assert rows[0]["name"] == "cat" and rows[0]["before_interval"][1] == 1.0
    text = Page(page(purified().document())).text
    assert "1 of 2 classes changed by more than chance" in text and "0 cat *" in text
    assert "\N{MINUS SIGN}90.0" in text and "+10.0" in text


def test_many_classes_are_shown_from_the_worst():
    counts = [tuple((c, right(c), 10) for c in range(100)) for right in (lambda c: 10, lambda c: 0 if c == 77 else 10)]
    before, after = (Evaluation(0.9, n=1000, per_class=one) for one in counts)
    shown = Page(page(purified(before=before, after=after).document()))
    assert "The 40 that fell the most are shown" in shown.text
    assert shown.text.index("77 *") < shown.text.index("\N{MINUS SIGN}100.0") < len(shown.text)


def test_what_is_not_known_is_said():
    bare = purified(before=Evaluation(0.9, n=20, on="5 held-out clean samples"), alerts=[], found={}, history=[],
                    after=Evaluation(0.9, n=20, on="5 held-out clean samples"), seconds={"total": 1.0},
                    origin=Origin())  # fmt: skip
    document = bare.document()
    unknown = " ".join(document["unknown"])
    for words in ("no triggered samples were given", "5 held-out clean samples", "rests on 20 samples"):
        assert words in unknown
    assert document["repeat"].startswith("result = fastfip.purify(model, clean_loader, 'fast_wfip'")
    text = Page(page(document)).text
    assert "Read this first" not in text and "the model was in memory" in text and "does not search" in text


def test_the_call_that_does_it_again_has_what_was_given():
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (torch.randn(9, 3, 2, 2), torch.arange(9) % 3)

    def losses(outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    result = fastfip.purify(model, data, "fine_tune", steps=1, force=True, progress=False, loss=losses, micro_batch=3)
    repeat = result.document()["repeat"]
    assert {"loss=loss", "force=True", "micro_batch=3"} <= set(repeat.removesuffix(")").split(", "))
    assert "forward=" not in repeat and "frozen=" not in repeat


def test_a_run_that_was_interrupted_while_it_was_measured_has_a_report():
    after = Evaluation(on="test_loader", notes=("interrupted while measuring the purified model",))
    document = purified(after=after, interrupted=True, history=[]).document()
    assert document["classes"] == [] and document["after"]["intervals"] == {}
    assert checker.errors(document, schema()) == []
    text = Page(page(document)).text
    assert "it was not measured" in text and "No epoch was completed" in text


def test_a_result_that_was_not_moved_or_still_has_its_backdoor_says_so():
    assert "nothing was moved" in purified(unchanged=True).document()["advice"][0]
    still = purified(
        before=Evaluation(0.9, 1.0, n=20, n_triggered=10), after=Evaluation(0.9, 0.4, n=20, n_triggered=10)
    )
    assert "still there: 40.0 %" in still.document()["advice"][0]


def test_what_an_audit_cannot_tell_is_not_an_acquittal():
    document = audited().document()
    assert document["alerts"] and "flagged" in document["title"] and "Do not use" in document["advice"][0]
    few = audited()
    for net in few.nets:
        net.anomaly = {"patch": anomaly(range(6), torch.ones(6), torch.zeros(6, dtype=torch.bool))}
    assert few.received.verdict == "cannot tell"
    document = few.document()
    assert document["alerts"] == [] and "may have a backdoor" in document["advice"][0]
    assert any("this audit cannot tell" in text for text in document["unknown"])


def test_the_report_of_a_run_shows_what_it_found_and_leaves_it_as_it_was(tmp_path):
    torch.manual_seed(0)
    x, y = data(24)
    y[3] = (y[3] + 1) % 3  # a wrong label
    clean, options = [(x, y)], {"steps": 12, "force": True, "holdout": 0.0}
    result = fastfip.purify(conv_net(), clean, "wfip", sieve=0.3, unlearn=0.5, test_loader=loader(), **options)
    changes = result.found["changes"]
    assert changes["pictures"].shape == (3, 6, 6) and changes["pictures"].dtype == np.uint8
    assert sorted(changes["classes"]) == [0, 1, 2] and changes["success"] == sorted(changes["success"], reverse=True)
    assert result.settings["inputs"]["shape"] == [2, 6, 6] and result.settings["inputs"]["high"] == pytest.approx(
        float(x.max())
    )
    assert len(pickle.dumps(result.found)) < 300_000 and json.loads(result.to_json())["before"]["n"] == 24
    assert [row[2] for row in result.before.per_class] == [8, 8, 8]
    assert sum(row[1] for row in result.after.per_class) == round(24 * result.after.acc)
    document = json.loads(result.report(tmp_path / "r.json").read_text())
    assert checker.errors(document, schema()) == [] and "png" in document["found"]["changes"][0]
    # What is kept for the report is no part of the run: the weights are those of a run of the same seed without it.
    left = result.settings["left_out_samples"]
    assert len(result.found.get("left_out", {"labels": []})["labels"]) == left


def test_pictures_of_every_kind_of_input():
    assert as_image(np.zeros((3, 4, 5))).shape == (4, 5, 3)
    assert as_image(np.zeros((2, 4, 5))).shape == (4, 5) and as_image(np.zeros((2, 3, 4, 5))).shape == (4, 5)
    assert as_image(np.arange(5.0)).shape == (3, 3) and np.isnan(as_image(np.arange(5.0))[2, 2])
    assert shrunk(np.ones((130, 65, 3)), 64).shape == (44, 22, 3)
    ramp = np.arange(256.0).reshape(1, 16, 16)
    assert np.allclose(shrunk(ramp[0], 8), ramp[0].reshape(8, 2, 8, 2).mean((1, 3)))
    picture, bound = of_change(np.array([[0.0, -2.0], [1.0, 0.0]]))
    assert bound == 2.0 and picture.tolist() == [[128, 1], [192, 128]]
    assert of_change(np.zeros((2, 2)))[0].tolist() == [[128, 128]] * 2
    shown = of_input(np.full((3, 2, 2), 0.5), np.zeros((3, 1, 1)), np.ones((3, 1, 1)))
    assert shown.shape == (2, 2, 3) and set(shown.ravel().tolist()) == {128}


def test_a_png_holds_the_picture():
    from PIL import Image

    picture, _ = of_change(np.array([[0.0, -2.0], [2.0, 0.0]]))
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(as_png(picture, change=True)))))
    same, lowered, raised = seen[0, 0].tolist(), seen[0, 1].tolist(), seen[1, 0].tolist()
    assert min(same) > 240 and lowered[2] > lowered[0] and raised[0] > raised[2]
    plain = np.asarray(Image.open(io.BytesIO(base64.b64decode(as_png(np.eye(3, dtype=np.uint8))))))
    assert plain.tolist() == np.eye(3).tolist()


def test_a_picture_that_is_no_base64_is_refused():
    document = purified().document()
    document["found"]["changes"][0]["png"] = 'x" onload="y'
    with pytest.raises(ValueError, match="no base64"):
        page(document)


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        purified().report(tmp_path / "missing" / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_reports_of_data_in_other_forms():
    """Outputs and inputs that nothing is known about: the report says less, and does not fail."""
    torch.manual_seed(0)
    model, clean = nn.Linear(4, 2), [(torch.randn(8, 4), torch.randn(8, 2))]
    result = fastfip.purify(
        model, clean, "fine_tune", steps=1, loss=lambda out, batch: (out - batch[1]).square().sum(1)
    )
    assert result.before.per_class == () and "Accuracy by class" not in page(result.document())
    with pytest.raises(DataError):
        fastfip.purify(model, [], "fine_tune")


def test_templates_and_schema_are_packaged():
    """Where setuptools finds them, so that a wheel has them."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'fastfip = ["py.typed", "reporting/templates/*"]' in pyproject and '"jinja2"' in pyproject
    names = {path.name for path in (ROOT / "fastfip/reporting/templates").iterdir() if path.is_file()}
    assert {
        "base.html",
        "parts.html",
        "purify.html",
        "audit.html",
        "compare.html",
        "report.css",
        "report.schema.json",
    } == names
