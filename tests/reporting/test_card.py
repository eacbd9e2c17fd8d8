"""The model card: its metadata, its figures, and texts that come from somebody else."""

import re

import pytest
import torch

from fastfip import purify
from fastfip.reporting.card import card, escaped, front_matter

yaml = pytest.importorskip("yaml")
EVIL = "a | b <script>alert(1)</script> [x](http://evil) `c` \x1b[2J\n# head\n---\n"


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    x, y = torch.randn(24, 5), torch.arange(24) % 3
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return purify(model, (x, y), "fine_tune", steps=3, seed=5, progress=False, force=True, test_loader=[(x, y)])


def made(result, **options):
    given = {**result.to_dict(), **options.pop("plain", {})}
    return card(given, result.rows(), **{"name": "a-name", "load": "import x", **options})


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_metadata_are_yaml_with_licence_base_model_and_tags(result):
    text = made(
        result, license="apache-2.0", base_model="owner/name", tags=["mine"], pipeline_tag="image-classification"
    )
    assert metadata(text) == {
        "license": "apache-2.0",
        "base_model": "owner/name",
        "pipeline_tag": "image-classification",
        "tags": ["fastfip", "backdoor-removal", "mine"],
    }
    assert "`apache-2.0`, the licence of the received weights" in text
    bare = made(result)
    assert set(metadata(bare)) == {"tags"} and "licence of the received weights is not known" in bare


def test_the_card_has_the_figures_of_the_result(result):
    text = made(result)
    for row in result.rows():
        assert "| " + " | ".join(escaped(cell) for cell in row) + " |" in text
    assert (
        "method: `fine_tune`, 3 steps" in text and "seed: 5" in text and f"torch {escaped(torch.__version__)}" in text
    )
    assert '"clean_samples": 24' in text and "24 of `test_loader`" in text
    assert "no certificate" in text.lower() and "nobody measured whether there was a backdoor" in text


def test_the_attack_that_was_measured_is_said_to_be_one_trigger(result):
    after = {**result.to_dict()["after"], "asr": 0.05, "n_triggered": 40}
    text = made(result, plain={"after": after, "der": 0.9})
    assert "measured with one trigger" in text and "DER 90.00 %" in text and "the share of 40 triggered samples" in text


def test_alerts_stand_above_the_figures(result):
    text = made(result, plain={"alerts": ["RUINED, clean accuracy fell"]})
    assert 0 < text.index("RUINED") < text.index("## Before and after")


def test_texts_of_others_are_shown_and_do_nothing(result):
    plain = {"notes": [EVIL], "alerts": [EVIL], "versions": {EVIL: EVIL}, "method": EVIL}
    settings = {**result.settings, "images": {"classes": [EVIL, "````\nout of the fence"]}, "seed": EVIL}
    text = made(result, name=EVIL, base_model=EVIL, license=EVIL, tags=[EVIL], plain={**plain, "settings": settings})
    found = metadata(text)
    assert found["base_model"] == EVIL and EVIL in found["tags"] and "license" not in found
    body = text.partition("\n---\n\n")[2]
    assert "\x1b" not in text
    assert [line for line in body.splitlines() if line.startswith("# ")] == [f"# {escaped(EVIL)}"]
    fence = re.search(r"^(`{3,})json$", body, re.MULTILINE)[1]
    assert len(fence) > 4 and body.count(f"\n{fence}\n") == 1
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"(`{3,})\w*\n.*?\n\1", "", body, flags=re.DOTALL))
    assert "<script>" not in outside and "](" not in re.sub(r"\\.", "", outside)


def test_escaped_text_is_one_line_without_marks_of_its_own():
    assert escaped("a|b") == r"a\|b" and escaped("<i>") == "&lt;i&gt;" and "\n" not in escaped("a\nb")
    assert escaped("www.evil.example") == r"www\.evil.example"


def test_plain_entries_of_metadata_are_read_and_others_left_out():
    text = '---\nlicense: "mit"\ntags:\n- x\nlist: [1]\nblock: |\n  license: gpl\n---\nlicense: bsd\n'
    found = front_matter(text)
    assert found["license"] == "mit" and "list" not in found and "block" not in found
    assert front_matter("# no metadata\nlicense: mit\n") == {} and front_matter("---\nlicense: mit\n") == {}
