"""What `compare` gives back: the rows, their means, the files and the plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fastfip.comparison.paper import PairedTest, as_frame, as_latex, as_markdown, paired_tests
from fastfip.errors import DataError, reason
from fastfip.metrics.evaluation import Evaluation
from fastfip.reporting.document import Documented, Origin
from fastfip.reporting.plots import COLOURS, MARKERS, labelled, new_figure, saved, styled
from fastfip.reporting.table import Sheet, write_text

__all__ = ["BASELINE", "Comparison", "Row", "Summary"]

#: The method of the row of the model as it was received.
BASELINE = "none"
_FIGURES = ("test_acc", "test_asr", "test_ra", "der", "rir", "seconds", "peak_memory")


@dataclass
class Row:
    """One run.

    `test_acc`, `test_asr` and `test_ra` are named and scaled as in BackdoorBench's tables: shares in [0, 1] of the
    clean test samples, of the triggered ones that go to the attack's label, and of those that get their true label.

    Attributes:
        method, label: its name; with the settings that are no default. config: all settings. seed: of the run.
        der, rir: see `fastfip.metrics`. acc_on: what `test_acc` was measured on.
        seconds: of the purification, without any evaluation. steps: of the optimiser.
        peak_memory: bytes above what was in use before the run; `memory_of` says of what.
        error: what ended it; the figures are None then.
        model, clean_set, test_set, asr_set: fingerprints. The rest says where it ran.
    """

    method: str
    label: str
    seed: int
    test_acc: float | None = None
    test_asr: float | None = None
    test_ra: float | None = None
    der: float | None = None
    rir: float | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    memory_of: str = ""
    steps: int | None = None
    acc_on: str = ""
    error: str = ""
    clean_samples: int = 0
    device: str = ""
    amp: str = ""
    threads: int = 0
    torch: str = ""
    fastfip: str = ""
    model: str = ""
    clean_set: str = ""
    test_set: str = ""
    asr_set: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """Return what makes it the same run."""
        settings = json.dumps(self.config, sort_keys=True, default=str)
        where = (self.clean_set, self.test_set, self.asr_set, self.device, self.amp, self.fastfip)
        return self.model, self.method, settings, str(self.seed), *where

    def take(self, before: Evaluation, after: Evaluation) -> None:
        """Fill in ACC, ASR and RA."""
        self.test_acc, self.test_asr, self.test_ra, self.acc_on = after.acc, after.asr, after.ra, after.on
        if after.acc is None:
            self.acc_on = ""
        if before is after and after.asr is not None and after.acc is not None:
            self.der = 0.5
            self.rir = None if after.ra is None else 0.5


@dataclass(frozen=True)
class Summary:
    """The runs of one method with one config: mean and standard deviation over the seeds.

    Attributes:
        label: of the rows. runs: rows with figures. failed: rows with an error. error: the first of them.
        mean, spread: figure -> value; a figure that no row has is missing, and so is the spread of a single run.
    """

    label: str
    runs: int
    failed: int
    error: str
    mean: dict[str, float]
    spread: dict[str, float]


@dataclass
class Comparison(Documented):
    """Rows of `compare`; `interrupted`: whether Ctrl-C ended it before all were there; `notes` are printed below.

    `unsaved`: why the file `out=` does not hold the rows, "" if it does. `origin` has files, data and command, and
    `images` how images became inputs, for the report; the command line fills them in.
    """

    kind = "compare"

    rows: list[Row]
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    unsaved: str = ""
    origin: Origin = field(default_factory=Origin)
    images: dict[str, Any] | None = None

    def summary(self) -> list[Summary]:
        """Return the methods, in the order of the rows."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.label, []).append(row)
        out = []
        for label, rows in groups.items():
            good, bad = [r for r in rows if not r.error], [r for r in rows if r.error]
            values = {name: [v for r in good if (v := getattr(r, name)) is not None] for name in _FIGURES}
            out.append(
                Summary(
                    label,
                    len(good),
                    len(bad),
                    bad[0].error if bad else "",
                    {name: mean(v) for name, v in values.items() if v},
                    {name: stdev(v) for name, v in values.items() if len(v) > 1},
                )
            )
        return out

    def table(self) -> Sheet:
        """Return the means over the seeds, with their standard deviations, as a table that prints."""
        summaries = self.summary()
        cells = [
            [
                s.label,
                *(_percent(s, name) for name in ("test_acc", "test_asr", "test_ra", "der")),
                _plain(s, "seconds", 1, "{:.2f}"),
                _plain(s, "peak_memory", 2**20, "{:.0f}"),
                f"{s.runs}" + (f" ({s.failed} failed)" if s.failed else ""),
            ]
            for s in summaries
        ]
        lines = [f"{s.label}: {s.error}" for s in summaries if s.error]
        on = sorted({row.acc_on for row in self.rows if row.acc_on and row.acc_on != "test_loader"})
        lines += [f"note: ACC is of the {', '.join(on)}"] if on else []
        if not any(row.test_asr is not None for row in self.rows):
            lines.append("note: no triggered images: ASR, RA and DER are not known")
        lines += [f"note: {note}" for note in self.notes]
        lines += [self.unsaved] if self.unsaved else []
        lines += ["interrupted: not all runs are there"] if self.interrupted else []
        samples = sorted({row.clean_samples for row in self.rows if row.clean_samples})
        title = f"{', '.join(map(str, samples))} clean samples" if samples else ""
        head = ("method", "ACC>", "ASR>", "RA>", "DER>", "seconds>", "extra MiB>", "runs>")
        return Sheet(title, head, cells, lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {"rows": [asdict(row) for row in self.rows], "interrupted": self.interrupted, "notes": list(self.notes)}

    def document(self) -> dict[str, Any]:
        """Return what the report says, as plain values: the rows, their means, and what could not be known."""
        from fastfip.comparison.document import document_of

        return document_of(self)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return the rows as CSV text, and write it if `path` is given. `config` is JSON in its cell."""
        names = [item.name for item in fields(Row) if item.name != "interrupted"]
        stream = io.StringIO()
        out = csv.DictWriter(stream, names, lineterminator="\n")
        out.writeheader()
        for row in self.rows:
            values = {name: getattr(row, name) for name in names}
            cells = {name: "" if value is None else value for name, value in values.items()}
            out.writerow({**cells, "config": json.dumps(row.config, default=str)})
        if path is not None:
            write_text(path, stream.getvalue())
        return stream.getvalue()

    def to_pandas(self) -> Any:
        """Return the runs as a pandas data frame, a row each; figures are shares, seconds and bytes.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return as_frame(self)

    def to_markdown(self, figures: Sequence[str] | None = None) -> str:
        """Return a Markdown table of the means over the runs, with their standard deviations.

        Args:
            figures: columns, some of "test_acc", "test_asr", "test_ra", "der", "rir", "seconds", "peak_memory"; None:
                all that were measured.

        Raises:
            ConfigError: an unknown figure.
        """
        return as_markdown(self, figures)

    def to_latex(self, figures: Sequence[str] | None = None) -> str:
        """Return a LaTeX tabular of the same, with the rules of the package booktabs; arguments as `to_markdown`."""
        return as_latex(self, figures)

    def paired(self, method: str, figure: str = "test_asr", others: Iterable[str] | None = None) -> list[PairedTest]:
        """Compare a method with others over the runs that both have: the same model, clean set and seed.

        Args:
            method: label of its rows.
            figure: what is compared; see `to_markdown`.
            others: labels; None: every other one.

        Returns:
            one `PairedTest` for each: mean difference, its spread and the p value of a sign-flip permutation test.

        Raises:
            ConfigError: an unknown figure.
            DataError: a label without a run that has the figure.
        """
        return paired_tests(self, method, figure, others)

    @classmethod
    def read(cls, path: str | Path) -> Comparison:
        """Return what `to_csv` or `to_json` wrote.

        Raises:
            DataError: the file cannot be read or holds something else.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                values = json.loads(text)
                return cls([Row(**row) for row in values["rows"]], bool(values["interrupted"]))
            return cls([_row(cells) for cells in csv.DictReader(text.splitlines(True))])
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            said = f"{type(error).__name__}: {reason(error)}"
            raise DataError(f"{path} is not what fastfip compare writes ({said})") from None

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw ACC against ASR (without triggered images: against seconds), the bubbles' area in proportion to seconds.

        Raises:
            ImportError: matplotlib is not installed.
        """
        summaries = [s for s in self.summary() if "test_acc" in s.mean]
        across = "test_asr" if any("test_asr" in s.mean for s in summaries) else "seconds"
        longest = max([s.mean.get("seconds", 0.0) for s in summaries], default=0.0) or 1.0
        figure = new_figure(7, 5)
        axes = figure.subplots()
        factor = 100 if across == "test_asr" else 1
        places: list[tuple[float, float]] = []
        words: list[str] = []
        for place, s in enumerate(s for s in summaries if across in s.mean):
            x, y = factor * s.mean[across], 100 * s.mean["test_acc"]
            colour = "black" if s.label == BASELINE else COLOURS[place % (len(COLOURS) - 1)]
            if s.label == BASELINE:
                axes.plot([x], [y], "x", color=colour)
            else:
                marker = MARKERS[place % len(MARKERS)]
                axes.scatter([x], [y], s=20 + 600 * s.mean["seconds"] / longest, color=colour, alpha=0.5, marker=marker)
            axes.errorbar(
                [x], [y], xerr=factor * s.spread.get(across, 0.0), yerr=100 * s.spread.get("test_acc", 0.0),
                color=colour, linewidth=0.8,
            )  # fmt: skip
            places.append((x, y))
            words.append("as received" if s.label == BASELINE else f"{s.label}, {s.mean['seconds']:.1f} s")
        axes.margins(0.15)
        styled(axes, "ASR (%)" if across == "test_asr" else "seconds", "ACC (%)", grid="both")
        axes.set_title("top left is better; area: seconds", fontsize=9, loc="left")
        labelled(axes, places, words)
        return saved(figure, path)


def _row(cells: dict[str, Any]) -> Row:
    """Read a row of a CSV."""
    kinds = {item.name: str(item.type) for item in fields(Row)}
    values: dict[str, Any] = {}
    for name, text in cells.items():
        kind = kinds[name]
        if name == "config":
            values[name] = json.loads(text)
        elif "None" in kind and text == "":
            values[name] = None
        elif "float" in kind:
            values[name] = float(text)
        elif "int" in kind:
            values[name] = int(text)
        else:
            values[name] = text
    return Row(**values)


def _percent(s: Summary, name: str) -> str:
    if name not in s.mean:
        return "-"
    return f"{100 * s.mean[name]:.2f}" + (f" ± {100 * s.spread[name]:.2f}" if name in s.spread else "")


def _plain(s: Summary, name: str, unit: float, form: str) -> str:
    if name not in s.mean or s.label == BASELINE:
        return "-"
    return form.format(s.mean[name] / unit) + (f" ± {form.format(s.spread[name] / unit)}" if name in s.spread else "")
