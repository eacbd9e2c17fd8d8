"""What a purification gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastfip.metrics import evaluation as metrics
from fastfip.metrics.evaluation import Evaluation
from fastfip.reporting.document import Documented, Origin
from fastfip.reporting.plots import COLOURS, MARKERS, legend_above, new_figure, saved, styled
from fastfip.reporting.table import Sheet

__all__ = ["PurifyResult"]


@dataclass(frozen=True)
class Coverage:
    """Which parameters a purification moved, and why it left the others alone.

    Attributes:
        tuned: names of the parameters whose values changed. left: name -> reason, of the others.
        tuned_numbers, numbers: how many numbers those have, and all of them.
    """

    tuned: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    tuned_numbers: int = 0
    numbers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**self.__dict__, "tuned": list(self.tuned), "left": dict(self.left)}

    def __str__(self) -> str:
        share = 100 * self.tuned_numbers / max(1, self.numbers)
        text = (
            f"tuned {len(self.tuned)} of {len(self.tuned) + len(self.left)} parameters ({share:.1f} % of the numbers)"
        )
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            text += f"; left alone: {', '.join(names[:3])}"
            text += (f" and {len(names) - 3} more" if len(names) > 3 else "") + f" ({reason})"
        return text


@dataclass(repr=False)
class PurifyResult(Documented):
    """A purified net, what was done to it and what that did.

    Attributes:
        model: the purified net; in place, the one that was given.
        method: its name. settings: the method's config, seed, device, sizes of the clean set and so on.
        before, after: ACC, ASR, RA, loss and Fisher trace (None: not measured); `.on` says on which data.
        history: one dict for each epoch.
        seconds: by purpose, no second counted twice: "fisher", "svd", "search", "train", "score" (held-out clean
            scores), "evaluation" (`before` and `after`), and "total", which has the rest as well.
        peak_memory: bytes. On CUDA the most that tensors took on the device during the call; on a CPU the largest
            resident memory of the whole process during the call (where the system cannot say that, since it began).
        versions: of fastfip, torch, Python. notes: what could not be known, and what was unusual.
        interrupted: whether Ctrl-C ended it; the model is then the last good state.
        alerts: what stands in the first line, because the result is not what was asked for: only fine-tuned, diverged,
            the model as it was given. diverged: whether it was stopped because the loss ran away; the model is then the
            last good state. unchanged: whether no parameter moved.
        coverage: which parameters were moved, and why the others were not.
        found: small pictures of what the method found, as arrays of bytes of a few hundred KB at most: "changes" has
            the worst-case changes of the classes that are reached best, "left_out" samples that the sieve kept out.
        origin: files, data and command, for the report; the command line fills it in.
    """

    kind = "purify"

    model: nn.Module
    method: str
    before: Evaluation
    after: Evaluation
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    alerts: list[str] = field(default_factory=list)
    diverged: bool = False
    unchanged: bool = False
    coverage: Coverage = field(default_factory=Coverage)
    found: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, with the keys, shapes and dtypes of the model that was given."""
        return dict(self.model.state_dict())

    def save_for_hub(self, folder: str | Path, **options: Any) -> Path:
        """Write weights, config and a model card to a new folder; options of `fastfip.checkpoint.hub.save_for_hub`."""
        from fastfip.checkpoint.hub import save_for_hub

        return save_for_hub(self, folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload that folder to Hugging Face's hub; options of `fastfip.checkpoint.hub.push_to_hub`."""
        from fastfip.checkpoint.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    @property
    def der(self) -> float | None:
        """Return the defence effectiveness rating, None without triggered images; see `fastfip.metrics.der`."""
        return None if self.after.acc is None or self.after.asr is None else metrics.der(self.before, self.after)

    @property
    def rir(self) -> float | None:
        """Return the robust improvement rating, None without triggered images; see `fastfip.metrics.rir`."""
        return None if self.after.acc is None or self.after.ra is None else metrics.rir(self.before, self.after)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the rows of the table: what, before, after."""
        out = []
        for name, word in (("acc", "ACC"), ("asr", "ASR"), ("ra", "RA"), ("loss", "loss"), ("fisher_trace", "Tr(F)")):
            pair = [getattr(side, name) for side in (self.before, self.after)]
            if pair == [None, None]:
                continue
            share = name in ("acc", "asr", "ra")
            shown = [side.shown(name) if share else _show(getattr(side, name)) for side in (self.before, self.after)]
            out.append((word, shown[0], shown[1]))
        return out

    def table(self) -> Sheet:
        """Return what is printed: figures before and after, then ratings, time, memory and notes."""
        return Sheet(self.title, ("", "before>", "after>"), self.rows(), self.footer())

    def footer(self) -> list[str]:
        """Return the lines below the table: ratings, time, memory, notes."""
        lines = []
        ratings = [
            f"{word} {100 * value:.2f} %" for word, value in (("DER", self.der), ("RIR", self.rir)) if value is not None
        ]
        if ratings:
            lines.append(", ".join(ratings))
        parts = [f"{name} {value:.2f}" for name, value in self.seconds.items() if name != "total" and value >= 0.005]
        total, memory = self.seconds.get("total", math.nan), self.peak_memory / 2**20
        lines.append(f"{total:.2f} s ({', '.join(parts)}), peak memory {memory:.0f} MiB")
        if self.coverage.numbers:
            lines.append(str(self.coverage))
        lines += [f"note: {note}" for note in self.notes]
        return lines

    @property
    def title(self) -> str:
        """Return the line above the table."""
        plain = f"{self.method} on {self.settings.get('clean_samples', '?')} clean samples"
        return ": ".join([plain, *(["; ".join(self.alerts)] if self.alerts else [])])

    def __repr__(self) -> str:
        first = f"{self.method}: {'; '.join(self.alerts)}" if self.alerts else self.method
        return f"<PurifyResult {first}: before {self.before}; after {self.after}>"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model and the pictures as plain values."""
        return {
            "method": self.method,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "der": self.der,
            "rir": self.rir,
            "history": [dict(record) for record in self.history],
            "seconds": dict(self.seconds),
            "peak_memory": self.peak_memory,
            "settings": self.settings,
            "versions": self.versions,
            "notes": list(self.notes),
            "interrupted": self.interrupted,
            "alerts": list(self.alerts),
            "diverged": self.diverged,
            "unchanged": self.unchanged,
            "coverage": self.coverage.to_dict(),
        }

    def document(self) -> dict[str, Any]:
        """Return what the report says, as plain values: `to_dict()` and more, pictures included."""
        from fastfip.purification.document import document_of

        return document_of(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the history and the figures before and after (needs matplotlib), to a file if `path` is given."""
        figure = new_figure(9, 3.5)
        course, bars = figure.subplots(1, 2, width_ratios=(3, 2))
        self.draw_history(course)
        self.draw_bars(bars)
        figure.suptitle(self.title, fontsize=10)
        return saved(figure, path)

    def draw_history(self, axes: Any) -> None:
        """Draw loss and held-out score by epoch on matplotlib axes."""
        shown = (("loss", "loss while tuning"), ("score", "held-out clean score"))
        for (name, word), colour, marker in zip(shown, COLOURS, MARKERS):
            points = [(record["epoch"], record[name]) for record in self.history if name in record]
            if points:
                axes.plot(*zip(*points), color=colour, marker=marker, markersize=3, linewidth=1.2, label=word)
        best = self.settings.get("best_epoch")
        if best is not None:
            axes.axvline(best, color="grey", linestyle=":", label=f"kept: epoch {best}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        styled(axes, "epoch", "loss")
        legend_above(axes)

    def draw_bars(self, axes: Any) -> None:
        """Draw ACC, ASR and RA before and after on matplotlib axes."""
        shown = [name for name in ("acc", "asr", "ra") if getattr(self.after, name) is not None]
        for shift, side, word, colour in (
            (-0.2, self.before, "before", COLOURS[0]),
            (0.2, self.after, "after", COLOURS[1]),
        ):
            heights = [100 * getattr(side, name) for name in shown]
            drawn = axes.bar([i + shift for i in range(len(shown))], heights, 0.38, label=word, color=colour)
            axes.bar_label(drawn, fmt="%.1f", fontsize=8)
        axes.set_xticks(range(len(shown)), [name.upper() for name in shown])
        axes.set_ylim(0, 110)
        axes.set_yticks(range(0, 101, 25))
        styled(axes, "", "share of samples (%)")
        legend_above(axes)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
