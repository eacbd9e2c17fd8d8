"""Models of other libraries in the states in which they are trained elsewhere, purified unchanged.

    python -m benchmarks.zoo.ways [--nets NAME ...] [--ways NAME ...] [--no-file]
    python -m benchmarks.zoo.ways --table                            # the document from the rows that are there

Fused attention, autocast to 16 bits, gradient checkpointing, torch.compile, channels-last: `purify` runs two steps of a
method on a model in that state and has to hand back the same keys in the same state. Exit code 1: a cell is wrong.
docs/zoo.md has the table.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastfip
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.zoo.checks import Wrong, judged
from benchmarks.zoo.library import version
from benchmarks.zoo.measure import DOCUMENT
from benchmarks.zoo.nets import NETS, Given, Net, labels, trained
from fastfip.data.batch import map_tensors
from fastfip.fisher.graph.reading import topological
from fastfip.nets.state import is_compiled

METHODS = ("fisher_steps", "fast_wfip")
#: Small ones of the families that purification has to take as they are.
UNCHANGED = (
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "efficientnet_lite0", "bert", "gpt2", "t5",
    "llama", "mixtral", "clip", "wav2vec2",
)  # fmt: skip
RESULTS = harness.Results(
    "zoo_ways",
    "net library way method verdict detail seconds versions machine torch commit",
    run="net library way method",
    order=lambda row: (UNCHANGED.index(row["net"]), list(WAYS).index(row["way"]), METHODS.index(row["method"])),
)


class NotThere(Exception):
    """The library has no such way for this model."""


@dataclass(frozen=True)
class Way:
    """A state of a model.

    Attributes:
        what: it is. put: brings a model and a batch into it, or raises NotThere. holds: a word on how a model is in it,
            None where it is not. options: of `purify`.
    """

    what: str
    put: Callable[[nn.Module, Given], tuple[nn.Module, Given]]
    holds: Callable[[nn.Module, Given], str | None]
    options: tuple[tuple[str, Any], ...] = ()


def _as_it_is(model: nn.Module, batch: Given) -> tuple[nn.Module, Given]:
    return model, batch


def _attention(model: nn.Module, batch: Given) -> str:
    """Name the attention in the graph of a pass: the fused one, or that there is none."""
    out = model(**batch).logits if isinstance(batch, dict) else model(batch[0])
    names = {node.name() for node in topological(out.grad_fn)}
    fused = sorted(name.removesuffix("0").removesuffix("Backward") for name in names if name.startswith("ScaledDot"))
    return f"fused: {', '.join(fused)}" if fused else "no fused attention in it"


def _checkpointed(model: nn.Module, batch: Given) -> tuple[nn.Module, Given]:
    if hasattr(model, "gradient_checkpointing_enable") and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    elif hasattr(model, "set_grad_checkpointing"):
        try:
            model.set_grad_checkpointing(True)
        except AssertionError as error:
            raise NotThere(str(error)) from None
    else:
        raise NotThere("the library has no gradient checkpointing for it")
    return model.train(), batch


def _is_checkpointed(model: nn.Module, batch: Given) -> str | None:
    said = [bool(getattr(m, name)) for m in model.modules() for name in _FLAGS if hasattr(m, name)]
    return "on" if any(said) and model.training else None


_FLAGS = ("gradient_checkpointing", "grad_checkpointing")


def _compiled(model: nn.Module, batch: Given) -> tuple[nn.Module, Given]:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager"), batch  # type: ignore[return-value]


def _channels_last(model: nn.Module, batch: Given) -> tuple[nn.Module, Given]:
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        raise NotThere("no images in it")
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, map_tensors(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t, batch)


def _is_channels_last(model: nn.Module, batch: Given) -> str | None:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return "on" if all(w.is_contiguous(memory_format=torch.channels_last) for w in weights) else None


WAYS = {
    "as it is": Way("as its library builds it, with fused attention where it has attention", _as_it_is, _attention),
    "bf16": Way("`amp=\"bf16\"`: autocast of the clean loss", _as_it_is, lambda *_: "on", (("amp", "bf16"),)),
    "fp16": Way("`amp=\"fp16\"`, with scaled losses", _as_it_is, lambda *_: "on", (("amp", "fp16"),)),
    "checkpointing": Way("the library's gradient checkpointing, in train mode", _checkpointed, _is_checkpointed),
    "compiled": Way(
        "`torch.compile(model, backend=\"aot_eager\")`", _compiled, lambda m, _: "on" if is_compiled(m) else None
    ),
    "channels-last": Way("weights and images in channels-last", _channels_last, _is_channels_last),
}  # fmt: skip


def check(way: Way, method: str) -> Callable[[nn.Module, Given], str]:
    """Return a check for `judged`: purify a model in that state."""

    def run(model: nn.Module, batch: Given) -> str:
        before = {name: (v.shape, v.dtype, v.stride()) for name, v in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        result = fastfip.purify(
            model, [batch], method, steps=2, weight_decay=0.0, progress=False, force=True, **dict(way.options)
        )
        after = result.state_dict()
        if {name: (v.shape, v.dtype, v.stride()) for name, v in after.items()} != before:
            raise Wrong("other keys, shapes, dtypes or strides")
        if not all(bool(torch.isfinite(v).all()) for v in after.values() if v.is_floating_point()):
            raise Wrong("NaN or Inf")
        if type(result.model) is not type(model) or [m.training for m in result.model.modules()] != modes:
            raise Wrong("another module, or other training flags")
        held = way.holds(result.model, batch)
        if held is None:
            raise Wrong("the result is no longer in that state")
        _trains_on(result.model, batch)
        return "; ".join([held, *result.alerts])

    return run


def _trains_on(model: nn.Module, batch: Given) -> None:
    """One more backward pass of the result: what was handed back can be trained further."""
    twin = copy.deepcopy(model) if not is_compiled(model) else model
    out = twin(**batch).logits if isinstance(batch, dict) else twin(batch[0])
    F.cross_entropy(out, labels(batch)).backward()
    grads = [p.grad for p in twin.parameters() if p.grad is not None]
    if not grads or not all(bool(torch.isfinite(g).all()) for g in grads):
        raise Wrong("the result has no finite gradients")
    twin.zero_grad()


def measure(net: Net, ways: Collection[str] = tuple(WAYS)) -> list[Row]:
    """Return a row for each of these ways and methods."""
    libraries = "timm" if net.library == "timm" else "transformers"
    common = {"net": net.name, "library": net.library, "versions": version(libraries)}
    first, given, rows = trained(net), net.data(), []
    for name in ways:
        for method in METHODS:
            start = time.perf_counter()
            row = {**common, "way": name, "method": method}
            try:
                model, batch = WAYS[name].put(copy.deepcopy(first), given)
                found = judged(check(WAYS[name], method), model, batch)
                row |= {"verdict": found.verdict, "detail": found.detail}
            except NotThere as error:
                row |= {"verdict": "none", "detail": str(error)}
            rows.append({**row, "seconds": round(time.perf_counter() - start, 1)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table: models by ways, and a line for each cell that is not right."""
    cells = {(row["net"], row["way"], row["method"]): row for row in rows}
    notes: list[str] = []
    lines = []
    for net in dict.fromkeys(row["net"] for row in rows):
        words = []
        for way in WAYS:
            pair = [cells[net, way, method] for method in METHODS if (net, way, method) in cells]
            words.append(_cell(pair, notes))
        lines.append([f"`{net}`", *words])
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("right", "refused", "wrong")}
    head = f"{len(rows)} runs: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    versions = ", ".join(sorted({row["versions"] for row in rows}))
    there = f"{head}; in the others the library has no such state. {versions}, torch {rows[0]['torch']}."
    shown = harness.table(["model", *WAYS], lines)
    return "\n".join([there, "", shown, "", *[f"{n}. {note}" for n, note in enumerate(notes, 1)]]).rstrip()


def _cell(pair: Sequence[dict[str, Any]], notes: list[str]) -> str:
    if not pair:
        return "-"
    if all(row["verdict"] == "right" for row in pair):
        return "right"
    row = next(row for row in pair if row["verdict"] != "right")
    both = all(other["verdict"] == row["verdict"] for other in pair)
    note = f"{'both' if both else row['method']}: {row['detail']}" if row["verdict"] != "none" else row["detail"]
    note = note.replace("|", "\\|").replace("<", "&lt;")
    if note not in notes:
        notes.append(note)
    return f"{'not there' if row['verdict'] == 'none' else row['verdict']} ({notes.index(note) + 1})"


def write_document() -> None:
    """Put the table into docs/zoo.md."""
    harness.splice(DOCUMENT, "ways", table(RESULTS.read()))


def main() -> None:
    """Measure, write the rows and the document."""
    parser = harness.Parser(__doc__, "threads")
    parser.add_argument("--nets", nargs="*", choices=UNCHANGED, help="names of models; all if left out")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), help="states; all if left out")
    parser.add_argument("--no-file", action="store_true", help="print, but do not write the rows")
    parser.add_argument("--table", action="store_true", help="write the document from the rows that are there")
    options = parser.parse()
    known = {net.name: net for net in NETS if net.name in UNCHANGED}
    wrong = 0
    for name in () if options.table else options.nets or UNCHANGED:
        torch.manual_seed(0)
        rows = measure(known[name], options.ways or tuple(WAYS))
        wrong += sum(row["verdict"] == "wrong" for row in rows)
        for row in rows:
            shown = {k: row[k] for k in ("net", "way", "method", "verdict", "seconds", "detail")}
            harness.show(shown, net=-30, way=-14, method=-13, verdict=-8, detail=-1)
        if not options.no_file:
            RESULTS.add(rows)
    if not options.no_file:
        write_document()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
