"""`fastfip fisher IN OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import Interrupted, undisturbed
from fastfip.cli.outputs import check_outputs, inputs_of, kept


def fisher(
    source: o.In,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="file to write, .safetensors or .pth")],
    net: o.Net,
    clean: o.Clean,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="empirical|mc|exact",
            help="labels to take: those of the data, labels drawn from the model, or all classes by their probability",
        ),
    ] = "empirical",
    likelihood: Annotated[
        str | None,
        typer.Option(
            "--likelihood",
            metavar="categorical|bernoulli|gaussian",
            help="what the outputs mean: categorical for softmax, bernoulli for sigmoid, gaussian for squared error",
            show_default="categorical",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="K", help="with --kind exact, only the K most probable classes of each image"),
    ] = None,
    seed: o.Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write the diagonal of the Fisher information of the model in IN to OUT.

    OUT holds one tensor for each trainable parameter, with its name and shape. The values are exact: they are
    the means of the squared gradients of the single images.
    """
    check_outputs(source, out, None, force, inputs_of(clean.data))

    from fastfip.errors import CheckpointError
    from fastfip.fisher import fisher_diagonal
    from fastfip.reporting.table import show, to_json

    opened = net.opened(source)
    model, where = opened.model, opened.where
    images = clean.load(opened.how, seed)
    batches = net.batches(images)
    logits = likelihood in (None, "categorical")
    forward, notes = o.as_logits(model, batches) if logits else (None, [])
    notes += images.words()
    kind_: Any = kind
    diagonal = fisher_diagonal(
        model.to(where),
        batches,
        kind_,
        likelihood=likelihood,
        forward=forward,
        top_k=top_k,
        seed=seed,
        progress=True if (wanted := o.progress(quiet)) is None else wanted,
    )
    with undisturbed() as came:
        lost = kept(out, lambda path: _write(diagonal, path))
    traces = {name: float(value.double().sum()) for name, value in diagonal.items()}
    whole = float(diagonal.trace())
    if as_json:
        figures = {"n": diagonal.n, "kind": kind, "trace": whole, "traces": traces, "coverage": diagonal.coverage}
        print(
            to_json({"checkpoint": str(source), "out": str(out), **figures, "notes": notes, "images": images.to_dict()})
        )
    else:
        show(_sheet(source, diagonal, traces, notes, f"trace {whole:.6g} over {diagonal.n} images, kind {kind}"))
        print("" if lost else f"wrote {out}")
    if lost:
        raise CheckpointError(lost)
    if came:
        raise Interrupted(f"interrupted: {out} holds the result, which is complete")


def _write(diagonal: Any, path: Path) -> None:
    from fastfip.checkpoint import save_checkpoint

    if path.suffix.lower() == ".safetensors":
        diagonal.save(path)  # with the number of images, the kind and the coverage
    else:
        save_checkpoint(diagonal, path)


def _sheet(source: Path, diagonal: Any, traces: dict[str, float], notes: list[str], line: str) -> Any:
    from fastfip.reporting.table import Sheet

    rows = [(name, _size(diagonal[name]), f"{traces[name]:.6g}", diagonal.coverage[name]) for name in diagonal]
    lines = [line, *(f"note: {note}" for note in notes)]
    return Sheet(str(source), ("parameter", "shape", "trace>", "found by"), rows, lines)


def _size(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "1"
