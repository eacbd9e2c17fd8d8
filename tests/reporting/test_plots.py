"""The plots can be read: nothing covers anything or leaves the picture, axes have names, colours are told apart."""

import colorsys

import pytest
import torch
from torch import nn

from fastfip.comparison.result import Comparison, Row
from fastfip.metrics import Evaluation
from fastfip.purification.result import PurifyResult
from fastfip.reporting import charts
from fastfip.reporting.plots import COLOURS, labelled, new_figure, styled

pytest.importorskip("matplotlib")


def purified(epochs=8):
    history = [{"epoch": k, "loss": 1.0, "score": 0.9} for k in range(1, epochs + 1)]
    after = Evaluation(1.0, 1.0, 1.0, 0.1, n=10)
    return PurifyResult(nn.Linear(1, 2), "fast_wfip", after, after, history, settings={"best_epoch": epochs})


def compared(far=1.0):
    """Methods with long names, crowded where the best ones are and at both ends of both axes."""
    places = [(0.0, 0.9), (0.01, 0.901), (0.0, 0.902), (1.0, 0.5), (0.99, 0.5), (0.5, 0.7), (far, 0.9)]
    rows = [Row("none", "none", 0, test_acc=0.91, test_asr=1.0, seconds=0.0)]
    for k, (asr, acc) in enumerate(places):
        rows.append(Row("m", f"a_rather_long_method(lr=0.0{k})", 0, test_acc=acc, test_asr=asr, seconds=1.0 + k))
    return Comparison(rows)


def drawn(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


def inside(outer, box, slack=1.0):
    return (
        box.x0 >= outer.x0 - slack
        and box.y0 >= outer.y0 - slack
        and box.x1 <= outer.x1 + slack
        and box.y1 <= outer.y1 + slack
    )


@pytest.mark.parametrize("make", [purified, compared], ids=["purify", "compare"])
def test_every_text_is_inside_the_picture(make):
    figure = drawn(make().plot())
    box = figure.get_tightbbox()  # of all that is drawn, in inches
    assert inside(figure.bbox_inches, box, 0.01), box


def test_no_legend_covers_bars_lines_or_their_figures():
    figure = drawn(purified().plot())
    for axes in figure.axes:
        box = axes.get_legend().get_window_extent()
        shapes = [*(patch.get_window_extent() for patch in axes.patches), *(t.get_window_extent() for t in axes.texts)]
        shapes += [line.get_window_extent() for line in axes.lines]
        assert shapes and not any(box.overlaps(shape) for shape in shapes)
        assert not inside(axes.get_window_extent(), box)


def test_the_demos_picture_has_the_same_legends(tmp_path):
    pytest.importorskip("sklearn")
    from matplotlib.figure import Figure

    from fastfip.cli.demonstration import _picture

    seen = []
    keep = Figure.savefig
    Figure.savefig = lambda self, *args, **options: seen.append(self)
    try:
        x, true = torch.rand(10, 1, 16, 16), torch.arange(10)
        _picture(tmp_path / "demo.png", purified(), x, true, torch.zeros(10, dtype=torch.int64), true)
    finally:
        Figure.savefig = keep
    (figure,) = seen
    drawn(figure)
    answers = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert answers[0] == "before: 0 \N{CHECK MARK}" and answers[1] == "before: 0 \N{BALLOT X}"
    for axes in figure.axes[-2:]:
        box = axes.get_legend().get_window_extent()
        assert not any(box.overlaps(patch.get_window_extent()) for patch in axes.patches)
        assert inside(figure.bbox, box)


def test_labels_of_a_comparison_stay_inside_its_axes_and_off_each_other():
    from matplotlib.text import Text

    (axes,) = drawn(compared().plot()).axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to their points
    assert len(boxes) == 8
    for place, box in enumerate(boxes):
        assert inside(axes.get_window_extent(), box), axes.texts[place].get_text()
        assert not any(box.overlaps(other) for other in boxes[:place]), axes.texts[place].get_text()


def test_labels_with_too_little_room_are_written_all_the_same():
    figure = new_figure(2, 2)
    axes = styled(figure.subplots(), "x", "y")
    points = [(0.5, 0.5)] * 4
    axes.plot(*zip(*points), "o")
    labelled(axes, points, ["far too long for such a small picture"] * 4)
    assert len(axes.texts) == 4


def test_axes_have_names_with_units():
    history, bars = purified().plot().axes
    assert (history.get_xlabel(), history.get_ylabel()) == ("epoch", "loss")
    assert bars.get_ylabel() == "share of samples (%)"
    (axes,) = compared().plot().axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ASR (%)", "ACC (%)")


def test_colours_differ_in_more_than_hue():
    """Also for who sees no hues: neighbours differ in lightness, and each series has a marker of its own."""
    lightness = [colorsys.rgb_to_hls(*(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)))[1] for colour in COLOURS]
    assert len(set(COLOURS)) == len(COLOURS) and abs(lightness[0] - lightness[1]) > 0.01
    history, bars = purified().plot().axes
    assert {line.get_color() for line in history.lines[:2]} == set(COLOURS[:2])
    assert len({line.get_marker() for line in history.lines[:2]}) == 2


def test_a_chart_of_the_page_holds_its_points():
    text = str(charts.course([("a", [(1, 0.5), (2, float("nan")), (3, 0.0)])], "epoch", "loss", (3, "kept")))
    assert text.count("<circle") == 3 and "nan" not in text  # two points and the key
    assert 'aria-label="loss by epoch: a from 0.5 to 0"' in text and "kept" in text
    assert str(charts.course([("a", [(1, float("nan"))])], "epoch", "loss")) == ""
    assert str(charts.course([("a", [(2, 3.0)])], "epoch", "loss")).count("<circle") == 2
    assert str(charts.shares([("A", [])], "nothing")) == ""


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.013), (-2, 7), (0, 1e-6), (0, 12345.0), (0, 3)])
def test_ticks_are_few_and_within(low, high):
    ticks = charts._ticks(low, high)
    assert 2 <= len(ticks) <= 6 and low <= min(ticks) and max(ticks) <= high * (1 + 1e-9)
    whole = charts._whole(1, max(1, round(abs(high))))
    assert whole[-1] == max(1, round(abs(high))) and len(whole) <= 7
