"""What `audit` gives back: figures, words, a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastfip.auditing.anomaly import LEVEL, SMALLER, Anomaly
from fastfip.reporting.document import Documented, Origin
from fastfip.reporting.pictures import as_image
from fastfip.reporting.plots import diverging, new_figure, saved
from fastfip.reporting.table import Sheet
from fastfip.worst_case.inversion import Inverted

__all__ = ["Audit", "NetAudit", "Retuning"]

CAVEAT = "This is evidence, not a certificate: an audit cannot find triggers of a form that it does not search for."
#: What the size of a change of each form is.
_UNIT = {"patch": "number of pixels covered", "additive": "norm of the pattern divided by the norm of a typical input"}
_SHORT = {"patch": "pixels", "additive": "norms"}
_KEY = (
    "Sizes: number of pixels covered, or L2 norm divided by that of a typical input. Colours: what is added to a "
    "pixel, in the units of the inputs\n(one channel: blue lowers, orange raises; three channels: grey is no change, "
    "± is the largest change)"
)


@dataclass(frozen=True)
class Retuning:
    """The re-tuning test. `course`: (step, ASR) pairs; `poisoned`: how many poisoned samples it tuned with.

    A net that only hides its backdoor gets it back within a few steps; one that never had it needs to learn it. There
    is no threshold: how fast a clean net learns from so many samples depends on the trigger.
    """

    course: tuple[tuple[int, float], ...]
    poisoned: int


@dataclass
class NetAudit:
    """What was found on one net.

    Attributes:
        name: "received" or "purified". inverted: by form, the changes. anomaly: by form, how the classes rank.
        sharpness: the fields of `fastfip.sharpness`, None where it was not measured.
        transfer: by form, for each class how often the change found on the received net still works on this one.
    """

    name: str
    inverted: dict[str, Inverted]
    anomaly: dict[str, Anomaly]
    sharpness: dict[str, Any] | None
    transfer: dict[str, list[float]] = field(default_factory=dict)

    @property
    def first(self) -> tuple[str, Anomaly] | None:
        """Return the form in which a class stands out most, and how."""
        known = [(form, ranking) for form, ranking in self.anomaly.items() if ranking.index]
        return max(known, key=lambda item: item[1].index[0], default=None)

    def p(self, form: str) -> float | None:
        """Return the share of clean nets in which chance sets a class apart so far, over all forms (Bonferroni)."""
        p = self.anomaly[form].p
        return None if p is None else min(1.0, p * len(self.anomaly))

    @property
    def flagged(self) -> list[int]:
        """Return the classes that stand out further than chance explains."""
        out = []
        for form, ranking in self.anomaly.items():
            p = self.p(form)
            if p is not None and p < LEVEL and ranking.ratio <= SMALLER:
                out.append(ranking.classes[0])
        return sorted(set(out))

    @property
    def verdict(self) -> str:
        """Return "flagged", "cannot tell" or "nothing stands out"."""
        if self.flagged:
            return "flagged"
        if not self.anomaly or all(ranking.p is None for ranking in self.anomaly.values()):
            return "cannot tell"
        # Much smaller than the others, but the others differ so much that chance may do it.
        if any(ranking.p is None or ranking.ratio <= SMALLER for ranking in self.anomaly.values()):
            return "cannot tell"
        return "nothing stands out"

    def words(self) -> str:
        """Return the verdict as a sentence."""
        if not self.anomaly:
            return f"{self.name} model: no changes were looked for"
        parts = []
        for form, ranking in self.anomaly.items():
            if ranking.why_not:
                parts.append(f"{form}: class {ranking.classes[0]} is first, but {ranking.why_not}")
            else:
                parts.append(
                    f"{form}: class {ranking.classes[0]} needs {ranking.ratio:.2f} of the median size, index "
                    f"{ranking.index[0]:.1f}, chance {self.p(form):.2g}"
                )
        word = self.verdict
        if self.flagged:
            word = f"class {', '.join(map(str, self.flagged))} flagged"
        return f"{self.name} model: {word} ({'; '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, without the pictures."""
        forms = {}
        for form, one in self.inverted.items():
            forms[form] = {
                "classes": one.classes.tolist(),
                "size": one.size.tolist(),
                "success": one.success.tolist(),
                "reached": one.reached.tolist(),
                "anomaly": asdict(self.anomaly[form]),
                "p": self.p(form),
                "transfer": self.transfer.get(form),
            }
        return {
            "verdict": self.verdict,
            "flagged": self.flagged,
            "forms": forms,
            "sharpness": self.sharpness,
        }


@dataclass
class Audit(Documented):
    """The evidence on a net, and on its purified copy where that was given; `interrupted`: by Ctrl-C.

    `origin` has files, data and command for the report; the command line fills it in.
    """

    kind = "audit"

    received: NetAudit
    purified: NetAudit | None
    retuning: Retuning | None
    settings: dict[str, Any]
    seconds: float
    notes: list[str]
    interrupted: bool = False
    origin: Origin = field(default_factory=Origin)

    @property
    def nets(self) -> list[NetAudit]:
        """Return the received net's findings, and the purified one's if there are some."""
        return [self.received] if self.purified is None else [self.received, self.purified]

    def table(self, most: int = 5) -> Sheet:
        """Return the classes that stand out most, as a table that prints."""
        rows = []
        for net in self.nets:
            for form, ranking in net.anomaly.items():
                one = net.inverted[form]
                labels = one.classes.tolist()
                for place, (c, index) in enumerate(zip(ranking.classes[:most], ranking.index)):
                    k = labels.index(c)
                    size = f"{float(one.size[k]):.3g}"
                    transfer = f"{100 * net.transfer[form][k]:.0f} %" if form in net.transfer else ""
                    rows.append(
                        [net.name if place == 0 else "", form if place == 0 else "", f"{c}",
                         size if bool(one.reached[k]) else f"> {size}", f"{100 * float(one.success[k]):.0f} %",
                         f"{index:.2f}", transfer]
                    )  # fmt: skip
        lines = [net.words() for net in self.nets]
        lines += list(self._sharpness())
        if self.retuning is not None:
            course = ", ".join(f"{step}: {100 * asr:.0f} %" for step, asr in self.retuning.course)
            lines.append(f"re-tuned with {self.retuning.poisoned} poisoned samples, ASR by steps: {course}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(CAVEAT)
        title = (
            f"Smallest change that leads to each class, {self.settings['samples']} clean samples, {self.seconds:.0f} s"
        )
        head = ["model", "form", "class>", "size>", "success>", "index>", "received's>"]
        if self.purified is None:
            head, rows = head[:-1], [row[:-1] for row in rows]
        units = "; ".join(f"{form}: {_UNIT[form]}" for form in self.received.anomaly)
        return Sheet(title, head, rows, [f"size of a change: {units}", *lines] if units else lines)

    def _sharpness(self) -> Iterator[str]:
        for net in self.nets:
            if net.sharpness is not None:
                s = net.sharpness
                yield (
                    f"{net.name} model: lambda_max {s['lambda_max']:.4g}, Tr(H) {s['trace_hessian']:.4g}, "
                    f"Tr(F) {s['trace_fisher']:.4g} on {s['n']} clean samples"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain values."""
        return {
            **{net.name: net.to_dict() for net in self.nets},
            "retuning": None if self.retuning is None else asdict(self.retuning),
            "settings": self.settings,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "interrupted": self.interrupted,
            "caveat": CAVEAT,
        }

    def document(self) -> dict[str, Any]:
        """Return what the report says, as plain values: `to_dict()` and more, pictures included."""
        from fastfip.auditing.document import document_of

        return document_of(self)

    def plot(self, path: str | Path | None = None, most: int = 4) -> Any:
        """Draw the changes of the classes that stand out most on the received net, there and on the purified net.

        Raises:
            ImportError: matplotlib is not installed.
        """
        lines = [(net, form) for form in self.received.anomaly for net in self.nets]
        wide = min(most, max([len(ranking.classes) for ranking in self.received.anomaly.values()], default=1))
        figure = new_figure(2.1 * wide + 1.4, 2.5 * max(1, len(lines)) + 0.9)
        grid = figure.subplots(max(1, len(lines)), wide, squeeze=False)
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
        for row, (net, form) in zip(grid, lines):
            one = net.inverted[form]
            labels = one.classes.tolist()
            row[0].set_ylabel(f"{net.name} model\n{form}", fontsize=9)
            for axes, c in zip(row, self.received.anomaly[form].classes):
                k = labels.index(c)
                _draw_change(figure, axes, one, k)
                bound = "" if bool(one.reached[k]) else "> "
                axes.set_title(f"class {c}: {bound}{float(one.size[k]):.3g} {_SHORT[form]}", fontsize=8)
                axes.set_xlabel(f"sends {100 * float(one.success[k]):.0f} % there", fontsize=8)
        figure.suptitle("Smallest changes that send clean inputs to a class", fontsize=10)
        figure.supxlabel(_KEY, fontsize=8)
        return saved(figure, path)


def _draw_change(figure: Any, axes: Any, one: Inverted, k: int) -> None:
    """Draw what the change adds to the mean input, with the key of its colours in the inputs' own units."""
    change = as_image((one.moved[k] - one.base).float().cpu().numpy())
    bound = float(np.nanmax(np.abs(change))) or 1.0
    if change.ndim == 3:  # in three colours: grey is no change
        axes.imshow(0.5 + 0.5 * change / bound, interpolation="nearest")
        axes.text(0.98, 0.02, f"± {bound:.2g}", transform=axes.transAxes, ha="right", va="bottom", fontsize=7,
                  bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5})  # fmt: skip
        return
    drawn = axes.imshow(change, cmap=diverging(), vmin=-bound, vmax=bound, interpolation="nearest")
    key = figure.colorbar(drawn, ax=axes, shrink=0.8, ticks=[-bound, 0, bound], pad=0.02, format="%.2g")
    key.ax.tick_params(labelsize=7)
